"""Every stage of the training, at toy size: it runs, resumes to the same bytes, and exports."""

import jax
import numpy as np
import pytest

from aegis_jax.world import architectures, clip, judge_training, stages, training

PLAN = stages.Plan(pool=192, clip_steps=4, vae_steps=4, judge_steps=4, unet_rounds=(4, 3), save_every=1000)
QUIET = {"log": lambda line: None}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(architectures.UNET, "block_out_channels", [32, 32])
    monkeypatch.setitem(architectures.VAE, "block_out_channels", [8, 8, 8])


def _train(name, shop, stop_at=None):
    if name == "clip":
        return stages.train_clip(shop, stop_at=stop_at)
    if name == "vae":
        return stages.train_vae(shop, stop_at=stop_at)
    rng = np.random.default_rng(0)
    if name == "unet":
        text = stages.start(stages.clip_model.CLIPTextModel, clip.text_config(), 0).params
        mean, logvar = rng.normal(size=(2, PLAN.pool, 8, 8, 4)).astype(np.float32)
        latents = stages.Latents(mean, logvar, shop.pool[1], 1.0)
        return stages.train_unet(shop, text, latents, stop_at=stop_at)
    images, label = shop.pool
    material = dict.fromkeys(("plain", "odd", "empty", "noise"), (images, label))
    return judge_training.train_judge(shop, name, material, stop_at=stop_at)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "vae", "judge", "second_judge", "unet"])
def test_a_resumed_stage_equals_an_uninterrupted_one(name, tmp_path):
    whole = _train(name, stages.Workshop(tmp_path / "a", 0, PLAN, **QUIET))
    shop = stages.Workshop(tmp_path / "b", 0, PLAN, **QUIET)
    shop.folder.mkdir()
    assert _train(name, shop, stop_at=2) is None
    jax.tree.map(np.testing.assert_array_equal, _train(name, shop), whole)


@pytest.mark.slow
def test_the_whole_training_exports_a_pipeline_that_diffusers_loads(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = training.train(tmp_path / "run", plan=PLAN, **QUIET)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    image = loaded("a red star", height=32, width=32, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    said = []
    training.train(tmp_path / "run", plan=PLAN, log=said.append)  # nothing is trained again
    assert sum("found" in line for line in said) == 5


def test_judge_batches_have_the_stated_mix_and_only_known_labels():
    shop = stages.Workshop(None, 0, PLAN)
    images, label = shop.pool
    material = dict.fromkeys(("plain", "odd", "empty", "noise"), (images, label))
    x, y = judge_training._judge_batch(np.random.default_rng(0), material)
    assert len(x) == len(y) == sum(judge_training.MIX.values()) == 64
    assert x.dtype == np.float32 and np.abs(x).max() < 1.5
    assert y.min() >= judge_training.IGNORE and (y.max(0) < (8, 6, 4)).all()
