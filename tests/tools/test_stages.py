"""Every stage of the training, at toy size: it runs, resumes to the same bytes, and exports."""

import dataclasses

import jax
import numpy as np
import pytest

from aegis_jax.errors import AegisError
from tools.world import architectures, fit, judges, stages, train

PLAN = stages.Plan(pool=192, clip_steps=4, vae_steps=4, judge_steps=4, unet_rounds=(4, 3), save_every=1000)
QUIET = {"log": lambda line: None}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(architectures.UNET, "block_out_channels", [32, 32])
    monkeypatch.setitem(architectures.VAE, "block_out_channels", [8, 8, 8])


def _train(name, shop):
    if name == "clip":
        return stages.train_clip(shop)
    if name == "vae":
        return stages.train_vae(shop)
    rng = np.random.default_rng(0)
    if name == "unet":
        text = stages.start(stages.clip_model.CLIPTextModel, architectures.text_config(), 0).params
        mean, logvar = rng.normal(size=(2, PLAN.pool, 8, 8, 4)).astype(np.float32)
        latents = stages.Latents(mean, logvar, shop.pool[1], 1.0)
        return stages.train_unet(shop, text, latents)
    images, label = shop.pool
    material = dict.fromkeys(("plain", "odd", "empty", "morph", "noise"), (images, label))
    return judges.train_judge(shop, name, material)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "vae", "judge", "second_judge", "unet"])
def test_a_resumed_stage_equals_an_uninterrupted_one(name, tmp_path, monkeypatch):
    whole = _train(name, stages.Workshop(tmp_path / "a", 0, PLAN, **QUIET))
    shop = stages.Workshop(tmp_path / "b", 0, dataclasses.replace(PLAN, save_every=2), **QUIET)

    def killed(self, step, metrics, seconds):
        if step == 3:
            raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(fit._Progress, "__call__", killed)
        with pytest.raises(SystemError, match="killed"):
            _train(name, shop)
    said = []
    resumed = _train(name, dataclasses.replace(shop, log=said.append))
    assert said[0] == f"{name}: resumed at step 2"
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.slow
def test_the_whole_training_exports_a_pipeline_that_diffusers_loads(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = train.train(tmp_path / "run", plan=PLAN, **QUIET)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    image = loaded("a red star", height=32, width=32, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    said = []
    train.train(tmp_path / "run", plan=PLAN, log=said.append)  # nothing is trained again
    assert sum("found" in line for line in said) == 5


def test_judge_batches_have_the_stated_mix_and_only_known_labels(monkeypatch):
    monkeypatch.setattr(judges, "_moved", lambda rng, x: x)
    kinds = ("plain", "odd", "empty", "morph", "noise")
    label = stages.Workshop(None, 0, PLAN).pool[1]
    shades = {kind: 40 * (1 + i) for i, kind in enumerate(kinds)}
    material = {kind: (np.full((len(label), 32, 32, 3), shade, np.uint8), label) for kind, shade in shades.items()}
    x, y = judges._judge_batch(np.random.default_rng(0), material)
    assert len(x) == len(y) == sum(judges.MIX.values()) == 64
    assert x.dtype == np.float32 and np.abs(x).max() < 1.5
    assert y.min() >= judges.IGNORE and (y.max(0) < (8, 6, 4)).all()
    shade = np.where(x.std((1, 2, 3)) < 0.1, (x.mean((1, 2, 3)) + 1) * 127.5, -100)  # not the broken ones
    for kind in ("odd", "empty", "morph"):
        assert (np.abs(shade - shades[kind]) < 10).sum() == judges.MIX[kind], kind


def test_morphs_show_and_name_their_nearer_end(monkeypatch):
    drawn = []
    monkeypatch.setattr(judges.renderer, "render", lambda rng, label: (drawn.append(label.copy()), label)[1])
    monkeypatch.setattr(judges, "encode_images", lambda vae, label: (label[:, :, None, None].astype(float),))
    monkeypatch.setattr(judges, "decode_latents", lambda vae, latents: latents[:, :, 0, 0])
    monkeypatch.setattr(judges, "disturbed", lambda rng, latents: latents)
    mixed, label = judges._morphs(np.random.default_rng(0), None, 500)
    first, last = drawn
    assert (first[:, 1] == last[:, 1]).all() and (label[:, 1] == first[:, 1]).all()
    differ = (first != last).any(1)
    distance = [np.abs(mixed - end).sum(1)[differ] for end in drawn]
    nearer = np.where((distance[0] < distance[1])[:, None], first[differ], last[differ])
    np.testing.assert_array_equal(label[differ], nearer)
    assert (label[:, [0, 2]] == -1).any(0).all() and differ.mean() > 0.7


def test_a_seed_out_of_range(capsys, tmp_path):
    with pytest.raises(AegisError, match="seed=-1"):
        train.train(tmp_path / "w", seed=-1)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--out", str(tmp_path / "w"), "--seed", str(2**32)])
    assert stopped.value.code == 2 and "wanted 0 to 2**32 - 1" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
