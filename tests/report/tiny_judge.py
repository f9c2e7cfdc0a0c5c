"""A judge for tests: says which of three bands of a picture is brightest; features are the bands' brightness."""

import numpy as np

from aegis_jax.judges import Judge, take

LABELS = ("church, church building", "dog", "cat")  # upper, middle, lower


def load(what: str, options: dict[str, str]) -> Judge:
    take(options)
    return Judge(
        name="tiny:",
        labels=LABELS,
        compute=lambda images: np.exp(bands(images)) / np.exp(bands(images)).sum(1, keepdims=True),
        digest="0" * 64,
        features=bands,
    )


def bands(images) -> np.ndarray:
    """uint8 (n, H, W, 3) -> (n, 3)"""
    bright = np.asarray(images, np.float64).mean(3) / 255
    return np.stack([band.mean((1, 2)) for band in np.array_split(bright, 3, axis=1)], axis=1)
