"""AdvUnlearn, STEREO and AGE run like every method: command, folder, card, checkpoints, export. Their mathematics:
tests/parity."""

import jax
import numpy as np
import pytest

import aegis_jax
from aegis_jax.cli import main
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.layout import torch_key
from aegis_jax.models.model import flatten
from tests.run import untrained
from tests.run.runs import erase, files, metrics
from tests.run.test_resume import interrupt
from tests.tiny import responsive

# The fewest layers with cross-attention; what has to survive an interruption is all there: pools, tokens, moments.
SMALL = {"mid_block_type": None, "up_block_types": ["UpBlock2D"]}
COMMON = {"latents.steps": 3, "latents.refresh_every": 2, "checkpoint.every": 10, "picture.images": 0}
ADVUNLEARN = COMMON | {
    "method": "advunlearn", "trainable": "text_encoder", "steps": 4, "attack.steps": 2, "attack.warm_up": 0.25,
    "attack.start": "latest", "retain.prompts": "a dog,red cat,church", "retain.batch": 2, "learning_rate": 1e-2,
}  # fmt: skip
STEREO = COMMON | {
    "method": "stereo", "steps": 10, "trainable": "kv", "inversion.steps": 2, "inversion.pictures": 4,
    "inversion.initial": "dog", "learning_rate": 1e-2,
}  # fmt: skip
AGE = COMMON | {"method": "age", "steps": 5, "trainable": "kv", "target.words": "dog,cat,church", "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    pipeline = responsive(load_pipeline(untrained.write(root / "faint", **SMALL)))
    aegis_jax.save_pipeline(pipeline, root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """{method: the folder of a finished run}."""
    root = tmp_path_factory.mktemp("runs")
    for keys in (ADVUNLEARN, STEREO, AGE):
        erase(small, root / keys["method"], keys=keys)
    return {keys["method"]: root / keys["method"] for keys in (ADVUNLEARN, STEREO, AGE)}


def component(path, name):
    return {key: value for key, value in files(path).items() if key.startswith(f"{name}/")}


def changed(before, after, name) -> set[str]:
    before, after = (flatten(getattr(p, name).params) for p in (before, after))
    return {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}


CUT = [(ADVUNLEARN, 2), (STEREO, 4), (STEREO, 7), (AGE, 3)]


@pytest.mark.parametrize(("keys", "step"), CUT, ids=["advunlearn", "2", "3", "age"])
def test_interrupted_and_resumed_is_as_uninterrupted(small, runs, tmp_path, monkeypatch, keys, step):
    """Within attacks; within the second round of the search, in whose pool a trajectory waits; within an inversion;
    with a choice of words that has moved."""
    out, whole = tmp_path / "run", runs[keys["method"]]
    interrupt(small, out, monkeypatch, step, keys=keys)
    assert len(metrics(out)) == step + 1
    aegis_jax.erase(out=out, resume=True)
    assert files(out / "pipeline") == files(whole / "pipeline")
    assert metrics(out) == metrics(whole) and len(metrics(out)) == keys["steps"]


def test_advunlearn_changes_the_text_encoder_alone(small, runs):
    """Its layers and last norm; in PyTorch too, which loads the folder."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pipeline = runs["advunlearn"] / "pipeline"
    before, after = load_pipeline(small), load_pipeline(pipeline)
    moved, names = changed(before, after, "text_encoder"), flatten(before.text_encoder.params)
    still = {path for path in names if "embeddings" in path or path.endswith("k_proj.bias")}  # that has no gradient
    assert moved - still == names.keys() - still and not any("embeddings" in path for path in moved)
    for name in ("unet", "vae", "tokenizer", "scheduler"):
        assert component(pipeline, name) == component(small, name) != {}
    encoder = transformers.CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")
    texts = ["star", "a red star", ""]
    with torch.no_grad():
        theirs = encoder(torch.tensor(after.tokenizer.ids(texts))).last_hidden_state.numpy()
    ours = np.asarray(aegis_jax.encode_text(after, texts))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - np.asarray(aegis_jax.encode_text(before, texts))).max() > 1e-3
    card = (pipeline / "README.md").read_text()
    assert "Only the text encoder differs from the original: UNet, VAE" in card and "'red cat'" in card
    assert "from step 2 on against a prompt that 2 steps of attack" in card


def test_a_delta_carries_the_text_encoder(small, runs, tmp_path):
    delta, applied = tmp_path / "delta.safetensors", tmp_path / "applied"
    assert main(["delta", str(runs["advunlearn"]), "--base", str(small), "--out", str(delta)]) == 0
    assert main(["apply", str(delta), "--model", str(small), "--out", str(applied)]) == 0
    assert files(applied) == files(runs["advunlearn"] / "pipeline")


def test_the_first_attack_comes_after_the_warm_up(runs):
    lines = metrics(runs["advunlearn"])
    assert ["L_adv" in line for line in lines] == [False, True, True, True]
    assert all({"L_e", "L_p", "drift_norm", "t"} <= line.keys() for line in lines)
    assert lines[0]["L_p"] < 1e-10 < lines[-1]["L_p"]  # theta is theta0 at first


def test_stereo_goes_through_its_phases(small, runs):
    lines, pipeline = metrics(runs["stereo"]), runs["stereo"] / "pipeline"
    assert [line["phase"] for line in lines] == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2]
    sizes = [line["drift_norm"] for line in lines]
    assert sizes[1] == sizes[2] == sizes[3] != sizes[4]  # an inversion trains no weights
    before, after = load_pipeline(small), load_pipeline(pipeline)
    kv = {path for path in flatten(before.unet.params) if path.endswith((".to_k.kernel", ".to_v.kernel"))}
    assert changed(before, after, "unet") == {path for path in kv if ".attn2." in path}
    assert component(pipeline, "text_encoder") == component(small, "text_encoder")
    assert "In 2 rounds the concept was erased and found again, from 4 pictures" in (pipeline / "README.md").read_text()


@pytest.mark.parametrize("method", ["advunlearn", "stereo", "age"])
def test_the_tensors_are_named(small, runs, method):
    """As PyTorch names them, those that changed."""
    result = aegis_jax.erase(out=runs[method], resume=True)
    name = "text_encoder" if method == "advunlearn" else "unet"
    moved = set(map(torch_key, changed(load_pipeline(small), result.pipeline, name)))
    assert {key for key in result.tensors if "k_proj.bias" not in key} == {k for k in moved if "k_proj.bias" not in k}


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"method": "advunlearn", "trainable": "qkv"}, ["trainable='qkv'", "text_encoder | full"]),
        ({"method": "advunlearn", "attack.rule": "lbfgs"}, ["attack.rule='lbfgs'", "adam | sign"]),
        ({"method": "advunlearn", "attack.warm_up": "1.5"}, ["attack.warm_up=1.5"]),
        ({"method": "advunlearn", "retain.prompts": "dog"}, ["retain.prompts: 1, fewer than retain.batch=5"]),
        ({"method": "advunlearn", "retain.prompts": "dog,star", "retain.batch": "2"}, ["names 'star'", "be erased"]),
        ({"method": "advunlearn", "retain.prompts": "dog,a red star", "retain.batch": "2"}, ["'a red star'", "'star'"]),
        (
            {"method": "stereo", "inversion.initial": "dog", "once.anchors": "nothing here"},
            ["once.anchors: 'nothing here' has no {}"],
        ),
        (
            {"method": "stereo", "inversion.initial": "dog", "inversion.prompt": "star " * 40},
            ["has 40 tokens", "shorten it"],
        ),
        ({"method": "advunlearn", "mesh.data": "2", "batch": "2"}, ["mesh"]),
        ({"method": "stereo", "trainable": "text_encoder"}, ["trainable='text_encoder'"]),
        ({"method": "stereo", "steps": "4"}, ["steps=4", "at least 5, one for each phase"]),
        ({"method": "stereo", "inversion.initial": "zzz"}, ["inversion.initial='zzz' is not one token"]),
        ({"method": "stereo", "inversion.texts": "animal"}, ["object | style | person"]),
        ({"method": "age", "target.form": "mixed"}, ["target.form='mixed'", "hard | soft"]),
        ({"method": "age", "target.words": "dog,a star"}, ["target.words: 'a star' names 'star'", "leave it out"]),
        ({"method": "age", "trainable": "text_encoder"}, ["trainable='text_encoder'"]),
        ({"method": "stereo", "latents.levels": "grid"}, ["unknown config key 'latents.levels'"]),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(small, tmp_path, capsys, keys, parts):
    argv = ["erase", "--model", str(small), "--concept", "star", "--out", str(tmp_path / "run")]
    argv += [f"--config.{key}={value}" for key, value in {"picture.images": "0", **keys}.items()]
    assert main(argv) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


def test_stereo_erases_one_concept(small):
    with pytest.raises(AegisError, match="erases one concept, got 2"):
        aegis_jax.erase(small, ["star", "red"], overrides=[(k, str(v)) for k, v in STEREO.items()])


def test_the_judge_and_the_attacks_see_the_trained_text_encoder(small, runs):
    """Pictures of the erased folder are of its own text encoder, and so is the prompt that an attack moves."""
    from aegis_jax.attacks.soft_prompt import networks

    before, after = load_pipeline(small), load_pipeline(runs["advunlearn"] / "pipeline")
    start = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    images = [aegis_jax.sample(p, "star", latents=start, steps=2) for p in (before, after)]
    assert (images[0] != images[1]).any()
    net = networks(after, "star", before)
    assert jax.tree.all(jax.tree.map(np.array_equal, net.text, after.text_encoder.params))
    np.testing.assert_array_equal(net.concept.embedding, aegis_jax.encode_text(before, ["star"]))
