"""An attacker's pictures of the concept: as latents, and split into those he trains on and those he picks by."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.models import vae

# A VAE keeps some 1.5 kB per pixel on its way: of 512x512 pictures one goes at a time, of 32x32 pictures 64.
PIXELS_PER_CALL = 64 * 32 * 32

_encode_images = jax.jit(lambda graph, params, images: vae.encode(graph, params, images)[0], static_argnums=0)


def checked(images, name: str) -> np.ndarray:
    """Images as an array. Raises `AegisError`, which names them, for what is no uint8 (m, H, W, 3) of at least one."""
    try:
        found = np.asarray(images)
    except ValueError:
        raise AegisError(f"{name} are of several shapes, wanted uint8 (m, H, W, 3)") from None
    if found.ndim != 4 or 0 in found.shape or found.shape[-1] != 3 or found.dtype != np.uint8:
        raise AegisError(f"{name} are {found.dtype} of shape {found.shape}, wanted uint8 (m, H, W, 3)")
    return found


def encode_images(pipeline, images, batch: int = 64) -> jax.Array:
    """uint8 images (m, H, W, 3) -> latents in the UNet's scale (m, h, w, C): the mean of the VAE's posterior.

    batch: the most images per call of the VAE; large images take fewer. Raises `AegisError` for what is no uint8 image.
    """
    images = checked(images, "images")
    model, scale = pipeline.vae, pipeline.vae.config.get("scaling_factor", 0.18215)
    batch = max(1, min(batch, PIXELS_PER_CALL // math.prod(images.shape[1:3])))
    parts = [
        _encode_images(model.graph, model.params, images[i : i + batch].astype(np.float32) / 127.5 - 1)
        for i in range(0, len(images), batch)
    ]
    return jnp.concatenate(parts) * scale


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images an attacker trains on, and which he holds out: every fourth, or the last of two or three.

    A single image is in both: then its noise and timesteps alone are apart.
    """
    numbers = np.arange(count)
    held_out = numbers % 4 == 3 if count > 3 else numbers == count - 1
    return (numbers[~held_out] if count > 1 else numbers), numbers[held_out]
