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
    material = dict.fromkeys(("plain", "odd", "empty", "morph", "noise"), (images, label))
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


def test_judge_batches_have_the_stated_mix_and_only_known_labels(monkeypatch):
    monkeypatch.setattr(judge_training, "_moved", lambda rng, x: x)
    kinds = ("plain", "odd", "empty", "morph", "noise")
    label = stages.Workshop(None, 0, PLAN).pool[1]
    shades = {kind: 40 * (1 + i) for i, kind in enumerate(kinds)}
    material = {kind: (np.full((len(label), 32, 32, 3), shade, np.uint8), label) for kind, shade in shades.items()}
    x, y = judge_training._judge_batch(np.random.default_rng(0), material)
    assert len(x) == len(y) == sum(judge_training.MIX.values()) == 64
    assert x.dtype == np.float32 and np.abs(x).max() < 1.5
    assert y.min() >= judge_training.IGNORE and (y.max(0) < (8, 6, 4)).all()
    shade = np.where(x.std((1, 2, 3)) < 0.1, (x.mean((1, 2, 3)) + 1) * 127.5, -100)  # not the broken ones
    for kind in ("odd", "empty", "morph"):
        assert (np.abs(shade - shades[kind]) < 10).sum() == judge_training.MIX[kind], kind


def test_morphs_show_and_name_their_nearer_end(monkeypatch):
    drawn = []
    monkeypatch.setattr(judge_training.renderer, "render", lambda rng, label: (drawn.append(label.copy()), label)[1])
    monkeypatch.setattr(judge_training, "encode_images", lambda vae, label: (label[:, :, None, None].astype(float),))
    monkeypatch.setattr(judge_training, "decode_latents", lambda vae, latents: latents[:, :, 0, 0])
    monkeypatch.setattr(judge_training, "_disturbed", lambda rng, latents: latents)
    mixed, label = judge_training._morphs(np.random.default_rng(0), None, 500)
    first, last = drawn
    assert (first[:, 1] == last[:, 1]).all() and (label[:, 1] == first[:, 1]).all()
    differ = (first != last).any(1)
    distance = [np.abs(mixed - end).sum(1)[differ] for end in drawn]
    nearer = np.where((distance[0] < distance[1])[:, None], first[differ], last[differ])
    np.testing.assert_array_equal(label[differ], nearer)
    assert (label[:, [0, 2]] == -1).any(0).all() and differ.mean() > 0.7
