"""An attacker's pictures: their latents against diffusers', how many go into a call, what is held out."""

import sys

import numpy as np
import pytest

from aegis_jax.attacks.images import PIXELS_PER_CALL, encode_images, split
from aegis_jax.io.pipeline import load_pipeline

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny())


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)


def test_latents_of_images_match_diffusers(tiny, pipeline, images):
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny(), subfolder="vae").eval()
    x = torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = vae.encode(x).latent_dist.mean.permute(0, 2, 3, 1).numpy() * vae.config.scaling_factor
    np.testing.assert_allclose(encode_images(pipeline, images, batch=2), wanted, atol=1e-4)


@pytest.mark.parametrize(
    "size, batch, wanted", [(16, 2, [2, 2, 1]), (128, 64, [4, 1]), (256, 8, [1] * 5), (512, 8, [1] * 5)]
)
def test_few_pixels_go_into_a_call_of_the_vae(monkeypatch, pipeline, size, batch, wanted):
    calls = []

    def encode(graph, params, images):
        calls.append(len(images))
        return np.zeros((len(images), 1, 1, 4))

    monkeypatch.setattr(sys.modules[encode_images.__module__], "_encode_images", encode)
    assert len(encode_images(pipeline, np.zeros((5, size, size, 3), np.uint8), batch)) == 5
    assert calls == wanted and max(calls) * size**2 <= max(PIXELS_PER_CALL, size**2)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 64])
def test_what_is_held_out_is_not_trained_on(count):
    train, held_out = split(count)
    assert len(train) and len(held_out) and not set(train) & set(held_out)
    assert sorted([*train, *held_out]) == list(range(count))


def test_a_single_image_serves_both():
    assert [list(part) for part in split(1)] == [[0], [0]]
