"""run/verify.py: agreement is found, and so is disagreement."""

import json

import pytest

from aegis_jax.cli import main
from aegis_jax.run import verify

pytest.importorskip("diffusers")
pytest.importorskip("torch")


EIGHT = {"unet": {"in_channels": 8, "out_channels": 8}, "vae": {"latent_channels": 8}}


@pytest.mark.parametrize("options", [{}, {"v_prediction": True, **EIGHT}], ids=["epsilon", "v_prediction_8_channels"])
def test_agrees(tiny, capsys, options):
    folder = tiny(**options)
    assert main(["verify", str(folder), "--steps", "3", "--prompt", "a red star"]) == 0
    out = capsys.readouterr().out
    assert "UNet output, t = 999" in out and "image, 3 steps" in out
    assert f"agree on {folder}" in out and "DISAGREE" not in out


def test_a_model_that_differs_is_noticed(tiny, capsys, monkeypatch):
    load, other = verify._load_torch, tiny(seed=1)
    monkeypatch.setattr(verify, "_load_torch", lambda folder: load(other))
    assert main(["verify", str(tiny()), "--steps", "2"]) == 1
    assert "DISAGREE" in capsys.readouterr().out


def test_what_diffusers_does_not_load_is_one_line(tiny_copy, capsys):
    folder = tiny_copy()
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "NoSuchExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    assert main(["verify", str(folder), "--steps", "1"]) == 2
    err = capsys.readouterr().err
    assert "diffusers does not take" in err and "NoSuchExtractor" in err and "Traceback" not in err


def test_a_unet_that_leaves_its_size_open(tiny_copy, capsys):
    folder = tiny_copy()
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"sample_size": None}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(folder), "--steps", "1"]) == 0
    assert "DISAGREE" not in capsys.readouterr().out


def test_a_size_that_diffusers_does_not_draw_is_one_line(tiny_copy, capsys):
    folder = tiny_copy()
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"sample_size": 7}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    shrink = 2 ** (len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]) - 1)
    assert 7 * shrink % 8
    assert main(["verify", str(folder), "--steps", "1"]) == 2
    err = capsys.readouterr().err
    assert "divisible by 8" in err and "Traceback" not in err
