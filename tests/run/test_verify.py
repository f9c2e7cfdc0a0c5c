"""run/verify.py: agreement is found, and so is disagreement."""

import json
import types

import jax.numpy as jnp
import pytest

from aegis_jax.cli import main
from aegis_jax.diffusion import sample, schedule
from aegis_jax.run import verify
from tests.tiny import FEWEST

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
    differing = types.SimpleNamespace(path=other, absent=())
    monkeypatch.setattr(verify, "_load_torch", lambda folder, variant: load(differing, variant))
    assert main(["verify", str(tiny()), "--steps", "2"]) == 1
    assert "DISAGREE" in capsys.readouterr().out


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(["verify", *map(str, argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("aegis: note: ")]
    return line


def test_a_folder_that_has_only_a_variant(tiny, capsys):
    folder = tiny(dtype="float16", variant="fp16")
    assert "--variant fp16" in refused(capsys, folder)
    assert main(["verify", str(folder), "--variant", "fp16", "--steps", "2"]) == 0
    assert "DISAGREE" not in capsys.readouterr().out
    assert "revisions are for hub ids only" in refused(capsys, folder, "--revision", "v2")


def test_a_tokenizer_that_states_no_length(tiny_copy, capsys, monkeypatch):
    folder = tiny_copy()
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    assert main(["verify", str(folder), "--steps", "1"]) == 0
    out, err = capsys.readouterr()
    assert "DISAGREE" not in out and "compared are 77" in err
    monkeypatch.setattr(verify, "_bound_prompts", lambda *_: None)
    assert "diffusers does not take" in refused(capsys, folder) and "OverflowError" in refused(capsys, folder)


def test_a_text_encoder_of_fewer_positions_than_the_tokenizer_says(tiny, capsys):
    assert main(["verify", str(tiny(**{**FEWEST, "text": {"max_position_embeddings": 16}})), "--steps", "1"]) == 0
    out, err = capsys.readouterr()
    assert "DISAGREE" not in out and "prompts of 77 tokens" in err and "compared are 16" in err


def test_a_text_encoder_of_another_width_is_one_line(tiny, capsys):
    assert "hidden_size is 32" in refused(capsys, tiny(unet={"cross_attention_dim": 48}))


def test_what_diffusers_unet_does_not_take_is_one_line(tiny, capsys, monkeypatch):
    load = verify._load_torch

    def narrower(*args):
        torch, theirs, with_ddim = load(*args)
        theirs.unet.conv_in = torch.nn.Conv2d(3, 32, 3, padding=1)
        return torch, theirs, with_ddim

    monkeypatch.setattr(verify, "_load_torch", narrower)
    assert "diffusers does not take" in refused(capsys, tiny(), "--steps", "1")


@pytest.mark.parametrize("steps", [61, 60])
def test_a_timestep_that_diffusers_gains_by_rounding_is_left_out(tiny, capsys, steps):
    folder = tiny(scheduler={"timestep_spacing": "trailing"})
    assert main(["verify", str(folder), "--steps", str(steps)]) == 0
    assert ("without its extra one at t = -1" in capsys.readouterr().out) == (steps == 61)


def with_sampler(folder, **config):
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


PNDM_OF_2022 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.4.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_end": 0.012}
KARRAS = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "scaled_linear", "use_karras_sigmas": True}


@pytest.mark.parametrize("config", [PNDM_OF_2022, ANCESTRAL, KARRAS], ids=lambda c: c["_class_name"])
def test_the_folders_own_sampler_is_run_with_our_unet(tiny_copy, config):
    report = verify.verify(with_sampler(tiny_copy(), **config), prompt="a red star", steps=6)
    assert report.differences[-1].what == f"image, 6 steps of {config['_class_name']}"
    assert report.agrees, report.text()


def test_outputs_that_differ_on_the_own_samplers_way_are_found(tiny_copy, monkeypatch):
    wrong = lambda sample, timestep, encoder_hidden_states, **_: (sample * 0.5,)  # noqa: E731
    monkeypatch.setattr(verify, "_forward_by", lambda *_: wrong)
    report = verify.verify(with_sampler(tiny_copy(), **KARRAS), steps=3)
    found = [d.what for d in report.differences if d.largest > d.allowed]
    assert found == [f"image, 3 steps of {KARRAS['_class_name']}"] and "DISAGREE" in report.text()


def test_clipped_latents_are_found(tiny_copy, monkeypatch):
    right = schedule.to_original
    monkeypatch.setattr(schedule, "to_original", lambda *args: jnp.clip(right(*args), -1, 1))
    sample._denoise.clear_cache()
    report = verify.verify(with_sampler(tiny_copy(), **PNDM_OF_2022), steps=6)
    sample._denoise.clear_cache()
    assert [d.what for d in report.differences if d.largest > d.allowed] == ["image, 6 steps"]
    assert "DISAGREE" in report.text()


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
