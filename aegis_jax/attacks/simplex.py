"""Rows of probabilities over a vocabulary: projection onto the simplex, draws.

Shapes: any leading axes, V tokens of the vocabulary.
"""

import jax
import jax.numpy as jnp

BISECTIONS = 30  # of an interval of length 1: beyond that float32 has no more digits


def project(rows: jax.Array) -> jax.Array:
    """The nearest rows (..., V) that are non-negative and sum to 1.

    They are max(x - mu, 0) with the one mu at which they sum to 1, found by bisection between the largest entry less 1,
    where the sum is at least 1, and the largest entry, where it is 0. Which entries stay above 0 then says mu exactly.
    """
    rows = rows - rows.max(-1, keepdims=True)  # which moves no projection, and large entries then cost no digits

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        above = jnp.maximum(rows - middle, 0).sum(-1, keepdims=True) >= 1
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    largest = jnp.zeros_like(rows[..., :1])
    low, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (largest - 1, largest))
    kept = rows > low
    mu = (jnp.where(kept, rows, 0).sum(-1, keepdims=True) - 1) / jnp.maximum(kept.sum(-1, keepdims=True), 1)
    return jnp.maximum(rows - mu, 0)


def draw(key, rows: jax.Array) -> jax.Array:
    """A token id for each row (..., V) of probabilities, int32 (...)."""
    return jax.random.categorical(key, jnp.log(rows)).astype(jnp.int32)
