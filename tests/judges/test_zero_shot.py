"""clip: against transformers' own CLIPModel, on random weights."""

import hashlib
import itertools
import shutil

import numpy as np
import pytest

from aegis_jax import judges
from aegis_jax.errors import AegisError
from aegis_jax.evaluation.metrics import similarity
from aegis_jax.judges.zero_shot import read_labels

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests.tiny_clip import tiny_clip  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = (RNG.integers(0, 200, (9, 1, 1, 3)) + RNG.integers(0, 56, (9, 40, 50, 3))).astype(np.uint8)
LABELS = "church\ta photo of a church\nred star\n\n dog \t a dog\ndog\tthe painting of a dog\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    model = tiny_clip(folder)
    (folder / "labels.txt").write_text(LABELS)
    return model, folder


def test_it_chooses_as_transformers_does(made):
    model, folder = made
    judge = judges.load(f"clip:{folder}")
    assert judge.labels == ("church", "red star", "dog")
    texts = ["a photo of a church", "red star", "a dog", "the painting of a dog"]
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    pixels = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(
        images=list(IMAGES), return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**tokens, **pixels)
        # transformers knows no mean of texts: two labels' columns are its own, the third's is taken from its vectors.
        mean = torch.nn.functional.normalize(out.text_embeds[2:].mean(0, keepdim=True), dim=-1)
        scores = torch.cat([out.logits_per_image[:, :2], model.logit_scale.exp() * out.image_embeds @ mean.T], dim=1)
    wanted = scores.softmax(-1).numpy()
    assert wanted.std(0).max() > 0.01
    np.testing.assert_allclose(judge.probabilities(IMAGES), wanted, atol=1e-4)
    np.testing.assert_array_equal(judge.shows(IMAGES, "dog"), wanted.argmax(1) == 2)
    assert judge.features(IMAGES).shape == (9, 20)
    assert judge.about["labels_sha256"] == hashlib.sha256(LABELS.encode()).hexdigest()
    assert judge.digest == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_labels_of_another_file(made, tmp_path):
    (tmp_path / "few.txt").write_text("cat\nchurch\n")
    judge = judges.load(f"clip:{made[1]}?labels={tmp_path}/few.txt")
    assert judge.labels == ("cat", "church")
    assert judges.load(f"clip:{made[1]}?top=2").top == 2
    with pytest.raises(AegisError, match="top=2 of 2 labels, so that each would count as shown"):
        judges.load(f"clip:{made[1]}?labels={tmp_path}/few.txt&top=2")
    with pytest.raises(AegisError, match="none.txt is missing: wanted what to choose from"):
        judges.load(f"clip:{made[1]}?labels={tmp_path}/none.txt")
    with pytest.raises(AegisError, match="say which"):
        judges.load("clip:")


def test_what_pictures_and_texts_are_prepared_by_is_part_of_what_it_is(made, tmp_path):
    folder = shutil.copytree(made[1], tmp_path / "clip")
    seen = [(judges.load(f"clip:{folder}").record("dog"), similarity.embedder(folder).digest)]
    for name, change in (
        ("preprocessor_config.json", lambda text: text.replace('"resample": 3', '"resample": 2')),
        ("merges.txt", lambda text: text[: text.rstrip().rindex("\n") + 1]),
    ):
        (folder / name).write_text(change((folder / name).read_text()))
        seen.append((judges.load(f"clip:{folder}").record("dog"), similarity.embedder(folder).digest))
    assert all(one != other for rows in zip(*seen) for one, other in itertools.combinations(rows, 2))
    assert len({record["sha256"] for record, _ in seen}) == 1  # that of the weights alone


def test_files_of_labels(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_bytes("\ufeffcat\na dog\t\n".encode())
    assert read_labels(file) == {"cat": ["cat"], "a dog": ["a dog"]}
    file.write_text("cat\u2028dog\r\nring\n")
    assert list(read_labels(file)) == ["cat\u2028dog", "ring"]
    file.write_text("cat\ndog\n\n\ta text\n")
    with pytest.raises(AegisError, match="labels.txt, line 4: no label before the tab"):
        read_labels(file)
    file.write_text("cat\n\ncat\tthe cat\n")
    with pytest.raises(AegisError, match="has 1 labels, wanted at least two"):
        read_labels(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(AegisError, match="not UTF-8"):
        read_labels(file)
