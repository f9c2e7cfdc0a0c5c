"""Flax's layers with initial values that can be left out, for models whose parameters come from a file.

Tracing the default initialisers only to learn shapes takes most of the time of loading a small pipeline. A key of None
therefore means: shape and dtype alone, however large. With a key the values are those of Flax's defaults, bit for bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


class NoKeys:
    """In place of `nnx.Rngs`: the layers get shapes instead of values."""

    def params(self) -> None:
        return None


def _or_hollow(values):
    """An initialiser that gives `values` with a key, and without one a `jax.ShapeDtypeStruct`."""

    def initialiser(key, shape, dtype=jnp.float32, **kwargs):
        if key is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        return values(key, shape, dtype, **kwargs)

    return initialiser


# Made once: a graph holds its initialisers, and two graphs of one config must be equal.
KERNEL = _or_hollow(nnx.initializers.lecun_normal())
EMBEDDING = _or_hollow(nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0))
ZEROS = _or_hollow(nnx.initializers.zeros_init())
ONES = _or_hollow(nnx.initializers.ones_init())

Linear = partial(nnx.Linear, kernel_init=KERNEL, bias_init=ZEROS)
Conv = partial(nnx.Conv, kernel_init=KERNEL, bias_init=ZEROS)
Embed = partial(nnx.Embed, embedding_init=EMBEDDING)
GroupNorm = partial(nnx.GroupNorm, scale_init=ONES, bias_init=ZEROS)
LayerNorm = partial(nnx.LayerNorm, scale_init=ONES, bias_init=ZEROS)
