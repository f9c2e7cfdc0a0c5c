"""Coordinates for the keys and values of cross-attention in which the text encoder's outputs are white. Not in the
paper (docs/decisions.md).

A text encoder's outputs lie along few directions: in the world 20 of 128 hold 98.5 % of their square. Adam gives every
weight a step of one size, whatever it is multiplied by, so a step changes keys and values mostly along those few.

With R = (C / c + _FLOOR)^(-power), where C is the second moment of random prompts' outputs and c the mean of its
eigenvalues, the weights W of a key or value are trained as W = W_0 + R A: Adam sees the gradient R g of A, and R times
its direction moves W. With a power of 1/2 every direction of text is as far away as every other.

Shapes: D text width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.erasure import groups, words

_KEYS_AND_VALUES = (".attn2.to_k.kernel", ".attn2.to_v.kernel")
_PROMPTS, _AT_ONCE = 1024, 64  # random prompts that C is taken from, and how many are encoded in one call
_FLOOR = 1e-3  # of c, below which a direction counts as unused: the most a direction is stretched by is _FLOOR^-power


def whitener(text_graph, text_params, vocabulary: words.Vocabulary, power: float, *, empty: float):
    """R (D, D), float32, symmetric. power: 0 to 0.5; empty: the share of random prompts that have no word.

    Encodes 1,024 prompts; how long that takes with CLIP has not been measured.
    """
    total = 0.0
    for i in range(_PROMPTS // _AT_ONCE):  # always the same prompts: nothing of a run hangs on which they are
        key = jax.random.key(i)
        states = words.random_prompts(text_graph, text_params, vocabulary, key, batch=_AT_ONCE, empty=empty)
        states = states.reshape(-1, states.shape[-1])
        total += jnp.matmul(states.T, states, precision="highest") / len(states)
    values, vectors = jnp.linalg.eigh(total)
    scaled = vectors * (jnp.maximum(values, 0) / jnp.mean(values) + _FLOOR) ** -power
    return jnp.matmul(scaled, vectors.T, precision="highest")


def apply(R, stacked: dict, like: dict) -> dict:
    """Gradients or updates, stacked by group, with R before those of cross-attention's keys and values.

    like: {path: anything with the shape} of what was stacked.
    """

    def one(name, paths):
        ours = np.array([path.endswith(_KEYS_AND_VALUES) for path in paths])
        x = stacked[name]
        return jnp.where(ours[:, None, None], R @ x.astype(jnp.float32), x) if ours.any() else x

    return {name: one(name, paths) for name, paths in groups.groups(like).items()}
