"""hf: against transformers itself, on small classifiers of random weights."""

import hashlib
import json
import sys

import numpy as np
import pytest

from aegis_jax import judges
from aegis_jax.errors import AegisError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RNG = np.random.default_rng(0)  # 35 pictures, more than a batch, of a colour each and grain
IMAGES = (RNG.integers(0, 200, (35, 1, 1, 3)) + RNG.integers(0, 56, (35, 20, 28, 3))).astype(np.uint8)
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2,
    "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_rescale": True,
}  # fmt: skip
NAMES = ("church, church building", "crane", "tench, Tinca tinca", "crane")


def vit(labels=NAMES, **more):
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
            patch_size=8, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}, **more,
        )
    )  # fmt: skip


def resnet():
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], id2label=dict(enumerate("abc"))
        )
    )


def saved(network, folder):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    network.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return network


def pixels():
    """What PROCESSOR says, done by Pillow and by hand."""
    from PIL import Image

    small = [Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR) for image in IMAGES]
    x = (np.stack([np.asarray(image) for image in small]) / 255 - PROCESSOR["image_mean"]) / PROCESSOR["image_std"]
    return torch.from_numpy(x.transpose(0, 3, 1, 2)).float()


def test_probabilities_are_the_models(tmp_path):
    network = saved(vit(), tmp_path)
    judge = judges.load(f"hf:{tmp_path}")
    with torch.no_grad():
        wanted = network(pixel_values=pixels()).logits.softmax(-1).numpy()
    assert wanted.std(0).min() > 1e-3  # pictures differ
    np.testing.assert_allclose(judge.probabilities(IMAGES), wanted, atol=1e-5)
    assert judge.labels == (NAMES[0], "crane (1)", NAMES[2], "crane (3)")
    np.testing.assert_array_equal(judge.shows(IMAGES, "church"), wanted.argmax(1) == 0)
    assert judge.digest == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert judge.name == f"hf:{tmp_path}" and judge.about["torch"] == torch.__version__


@pytest.mark.parametrize("make", [vit, resnet])
def test_features_are_what_the_last_layer_sees(tmp_path, make):
    network = saved(make(), tmp_path)
    judge = judges.load(f"hf:{tmp_path}")
    features = judge.features(IMAGES)
    head = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
    scores = torch.nn.functional.linear(torch.from_numpy(features), head.weight, head.bias).softmax(-1)
    np.testing.assert_allclose(scores.detach().numpy(), judge.probabilities(IMAGES), atol=1e-5)


def test_the_first_few_count_where_that_is_said(tmp_path):
    saved(vit(), tmp_path)
    first, three = (judges.load(f"hf:{tmp_path}{more}") for more in ("", "?top=3"))
    assert three.name.endswith("?top=3")
    p = first.probabilities(IMAGES)
    assert (first.shown(p).sum(1) == 1).all() and (three.shown(p).sum(1) == 3).all()
    with pytest.raises(AegisError, match="top=4 of 4 labels, so that each would"):
        judges.load(f"hf:{tmp_path}?top={len(first.labels)}")


@pytest.mark.parametrize("device", ["nonsense", "meta:x", "meta", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_pytorch_does_not_have_is_refused(tmp_path, device):
    saved(vit(), tmp_path)
    with pytest.raises(AegisError, match=f"option device='{device}': PyTorch has none"):
        judges.load(f"hf:{tmp_path}?device={device}")


def test_several_labels_at_once(tmp_path):
    network = saved(vit(problem_type="multi_label_classification"), tmp_path)
    judge = judges.load(f"hf:{tmp_path}")
    with torch.no_grad():
        wanted = network(pixel_values=pixels()).logits.sigmoid().numpy()
    np.testing.assert_allclose(judge.probabilities(IMAGES), wanted, atol=1e-5)
    np.testing.assert_array_equal(judge.shown(wanted), wanted >= 0.5)
    with pytest.raises(AegisError, match="top=3 does not go with thresholds"):
        judges.load(f"hf:{tmp_path}?top=3")


def test_a_single_label_is_shown_from_a_half_on_or_refused(tmp_path):
    network = saved(vit(problem_type="multi_label_classification", labels=("nsfw",)), tmp_path)
    judge = judges.load(f"hf:{tmp_path}")
    with torch.no_grad():
        wanted = network(pixel_values=pixels()).logits.sigmoid().numpy()
    np.testing.assert_array_equal(judge.shown(judge.probabilities(IMAGES)), wanted >= 0.5)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"problem_type": None}))
    with pytest.raises(AegisError, match='has one label, .nsfw., and .* "problem_type": "multi_label_classification"'):
        judges.load(f"hf:{tmp_path}")


def test_what_pictures_are_prepared_by_is_part_of_its_record(tmp_path):
    saved(vit(), tmp_path)
    first = judges.load(f"hf:{tmp_path}").record("church")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"image_mean": [0, 0, 0]}))
    assert judges.load(f"hf:{tmp_path}").record("church") != first


def test_what_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(AegisError, match="is no model: wanted a folder with a config.json, or a hub id"):
        judges.load(f"hf:{tmp_path}/nothing")
    body = tmp_path / "body"
    saved(transformers.ViTModel(vit().config), body)
    with pytest.raises(AegisError, match="is no image classifier: a .'ViTModel'. without 'classifier.bias' and 1 more"):
        judges.load(f"hf:{body}")
    (body / "model.safetensors").rename(body / "pytorch_model.bin")
    with pytest.raises(AegisError, match="no model.safetensors, and pickles are refused; convert it once"):
        judges.load(f"hf:{body}")
    with pytest.raises(AegisError, match="say which"):
        judges.load("hf:")
    (body / "pytorch_model.bin").rename(body / "model.safetensors")
    (body / "preprocessor_config.json").unlink()
    with pytest.raises(AegisError, match="cannot be read as an image classifier"):
        judges.load(f"hf:{body}")
    with pytest.raises(AegisError, match="revision 'main' was given but .* is no hub id"):
        judges.load(f"hf:{body}?revision=main")


@pytest.mark.parametrize(("spec", "extra", "absent"), [("hf:x", "torch", "torch"), ("nudenet:", "nudenet", "nudenet")])
def test_an_absent_package_is_named(monkeypatch, spec, extra, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(AegisError, match=rf"pip install 'aegis_jax\[{extra}\]'"):
        judges.load(spec)
