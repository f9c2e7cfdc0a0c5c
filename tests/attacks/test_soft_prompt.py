"""The soft-prompt attack, on a tiny random pipeline and against its own definition."""

import sys

import numpy as np
import pytest

from aegis_jax.attacks import attack
from aegis_jax.attacks.soft_prompt import encode_images
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny())


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def found(pipeline, images):
    return attack(pipeline, "red star", images=images, tokens=2, restarts=3, steps=20, batch=4, seed=1)


def test_shapes_and_that_every_restart_descends(found):
    assert found.soft_tokens.shape[:2] == (3, 2) and found.losses.shape == (20, 3)
    assert found.text_emb.shape[0] == 3 and np.isfinite(found.losses).all()
    assert not np.allclose(found.soft_tokens[0], found.soft_tokens[1])
    # Same draws for all restarts, so their losses differ by the prompt alone: little against the draw's own spread.
    assert np.ptp(found.losses, axis=1).max() < np.ptp(found.losses[:, 0])


def test_same_seed_same_attack(pipeline, images, found):
    again = attack(pipeline, "red star", images=images, tokens=2, restarts=3, steps=20, batch=4, seed=1)
    np.testing.assert_array_equal(again.soft_tokens, found.soft_tokens)


def test_restarts_that_do_not_fit_together_run_one_after_the_other(monkeypatch, pipeline, images, found):
    module = sys.modules[encode_images.__module__]  # whose name is that of a function, too
    monkeypatch.setattr(module, "PIXELS_PER_CALL", 4 * 64)  # one restart at a time, recomputing
    shown = []
    settings = {"tokens": 2, "restarts": 3, "steps": 20, "batch": 4, "seed": 1}
    again = attack(pipeline, "red star", images=images, progress=lambda *line: shown.append(line[:2]), **settings)
    np.testing.assert_allclose(again.soft_tokens, found.soft_tokens, atol=1e-4)
    np.testing.assert_allclose(again.losses, found.losses, rtol=1e-4)
    assert shown == [(step, 60) for step in range(10, 70, 10)]


def test_latents_of_images_match_diffusers(tiny, pipeline, images):
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny(), subfolder="vae").eval()
    x = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = vae.encode(x).latent_dist.mean.permute(0, 2, 3, 1).numpy() * vae.config.scaling_factor
    np.testing.assert_allclose(encode_images(pipeline, images), wanted, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "gcg"}, "attack method 'gcg' is unknown"),
        ({"step": 3}, "no setting 'step'"),
        ({"restarts": 0}, "restarts=0"),
        ({"seed": -1}, "seed=-1"),
        ({"tokens": 76}, "exceed the 77 positions"),
        ({"images": np.zeros((2, 16, 16, 3))}, "wanted uint8"),
        ({"images": []}, "wanted uint8"),
    ],
)
def test_bad_input_is_named(pipeline, images, change, message):
    with pytest.raises(AegisError, match=message):
        attack(pipeline, "red star", **({"images": images} | change))
