"""CLIP's two towers and the preparation of pictures against transformers' CLIPModel, random weights, float32, CPU."""

import json

import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.io import clip as lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests.parity import compare  # noqa: E402
from tests.tiny_clip import PREPROCESSOR, tiny_clip  # noqa: E402

RNG = np.random.default_rng(0)
TEXTS = ["a photo of a church", "", "the red star on a striped background in the sky of a dog and a cat", "church"]


def pictures(height, width, n=3):
    """Smooth ones, each of its own colours: noise would be averaged away by the resizing."""
    x = np.sin(np.arange(width) / 9 + RNG.uniform(0, 6, (n, 3, height, 1)) + np.arange(height)[:, None] / 7)
    return (127.5 + 127 * x.transpose(0, 2, 3, 1)).astype(np.uint8)


def wanted_texts(model, folder, texts):
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model.get_text_features(**tokens).pooler_output.numpy()


def wanted_images(model, folder, images):
    prepared = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(
        images=list(images), return_tensors="pt"
    )
    with torch.no_grad():
        return model.get_image_features(**prepared).pooler_output.numpy()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("options", [{}, {"eos": 2, "hidden_act": "gelu", "patch_size": 16}], ids=["new", "old"])
def test_towers(tmp_path, options):
    model = tiny_clip(tmp_path, **options)
    ours = lib.load_clip(tmp_path)
    with pytest.warns(UserWarning, match="cut off"):
        found = ours.embed_texts(TEXTS)
    wanted = unit(wanted_texts(model, tmp_path, TEXTS))
    assert np.abs(wanted[:, None] - wanted[None])[~np.eye(len(TEXTS), dtype=bool)].max(-1).min() > 0.01
    compare.assert_output(found, wanted, "clip text features")
    images = pictures(50, 70, 33)  # more than a batch
    wanted = wanted_images(model, tmp_path, images)
    assert wanted.std(0).max() > 0.1
    np.testing.assert_allclose(ours.image_features(images), wanted, atol=1e-4 * wanted.std())
    compare.assert_output(ours.embed_images(images), unit(wanted), "clip image features")
    np.testing.assert_allclose(ours.scale, model.logit_scale.exp().item(), rtol=1e-6)


def test_the_older_tables_of_a_config_are_taken_where_both_stand(tmp_path):
    """With transformers' defaults where they are silent, whatever the newer ones say."""
    tiny_clip(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name in ("text_config", "vision_config"):
        older = {key: value for key, value in config[name].items() if key != "layer_norm_eps"}
        config[f"{name}_dict"] = older | {"hidden_act": "gelu"}
        config[name] |= {"layer_norm_eps": 0.1, "num_hidden_layers": 1}
    file.write_text(json.dumps(config))
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert model.config.vision_config.hidden_act == "gelu"
    ours = lib.load_clip(tmp_path)
    compare.assert_output(ours.embed_texts(["church"]), unit(wanted_texts(model, tmp_path, ["church"])), "clip texts")
    images = pictures(50, 70)
    compare.assert_output(ours.embed_images(images), unit(wanted_images(model, tmp_path, images)), "clip images")


@pytest.mark.parametrize("size", [(40, 40), (61, 47), (47, 61), (200, 33), (32, 32)])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"size": 36, "crop_size": 32},
        {"size": {"height": 33, "width": 50}},
        {"do_resize": False},
        {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]},
        {"do_normalize": False},
    ],
    ids=lambda change: "-".join(change) or "as-is",
)
def test_preparation(tmp_path, size, change):
    folder = tmp_path / "p"
    folder.mkdir()
    config = PREPROCESSOR | change
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    images = pictures(*size)
    wanted = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")(
        images=list(images), return_tensors="np", input_data_format="channels_last"
    )["pixel_values"]
    found = lib.prepare(images, lib._preparation(folder, 32))
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), wanted, atol=1e-5)


def test_without_a_preprocessor_pictures_fit_the_tower(tmp_path):
    tiny_clip(tmp_path, preprocessor=None)
    assert lib.load_clip(tmp_path).embed_images(pictures(50, 70)).shape == (3, 20)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_config": {"hidden_act": "snake"}}, "hidden_act='snake'"),
        ({"vision_config": {"patch_size": 7}}, "whole patches"),
        ({"vision_config": {"num_hidden_layers": 3}}, "missing 'vision_model.encoder.layers.2"),
        ({"vision_config": {"hidden_size": "x"}}, "hidden_size='x'"),
        ({"text_config": {"num_attention_heads": 5}}, "num_attention_heads=5"),
        ({"vision_config_dict": {"patch_size": 9}}, "whole patches"),
        ({"text_config_dict": [1]}, r"text_config=\[1\] .wanted: a table."),
        ({"projection_dim": 21}, "text_projection.weight' has shape"),
        ({"architectures": ["SiglipModel"]}, "wanted a CLIPModel"),
    ],
)
def test_other_folders_are_refused(tmp_path, change, said):
    tiny_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AegisError, match=said):
        lib.load_clip(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": {"longest_edge": 3}}, "size={'longest_edge': 3}"),
        ({"crop_size": 48}, "are resized to .40, 40. and cut to .48, 48."),
        ({"crop_size": 24}, "24x24 pixels and the image tower wants 32"),
        ({"image_mean": [0.5]}, "image_mean"),
    ],
)
def test_preparations_that_do_not_fit_are_refused(tmp_path, change, said):
    tiny_clip(tmp_path, preprocessor=PREPROCESSOR | change)
    with pytest.raises(AegisError, match=said):
        lib.load_clip(tmp_path)
