"""Attention in blocks of queries, against PyTorch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from aegis_jax.models import blockwise
from aegis_jax.models.attend import attend


def tensors(queries, keys, heads, head_dim, spread=1.0):
    rng = np.random.default_rng(queries + keys + head_dim)
    shapes = [(2, n, heads, head_dim) for n in (queries, keys, keys, queries)]
    return [rng.normal(0, spread, shape) for shape in shapes]


def in_pytorch(q, k, v, g):
    """Output and gradients of <output, g>, float64."""
    q, k, v = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    out.backward(torch.tensor(g))
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]


def value_and_gradients(q, k, v, g, dtype=jnp.float32):
    q, k, v, g = (jnp.asarray(x, dtype) for x in (q, k, v, g))
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(g)


@pytest.mark.parametrize(
    "queries, keys, heads, head_dim, spread",
    [
        (1024, 1024, 2, 8, 1.0),
        (1728, 1200, 1, 10, 1.0),  # latents of 36 x 48: blocks of 432 and 216
        (1221, 1221, 1, 5, 1.0),  # of 33 x 37: blocks of 111
        (1024, 1024, 1, 40, 6.0),  # scores of some 200, where exp alone would overflow
    ],
)
def test_output_and_gradients(queries, keys, heads, head_dim, spread):
    given = tensors(queries, keys, heads, head_dim, spread)
    for found, wanted in zip(jax.jit(value_and_gradients)(*given), in_pytorch(*given), strict=True):
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_bfloat16_is_computed_in_float32():
    given = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in tensors(1024, 1024, 1, 8)]
    found = value_and_gradients(*given, dtype=jnp.bfloat16)
    for x, wanted in zip(found, in_pytorch(*given), strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.abs(np.asarray(x, np.float64) - wanted).max() < 2**-8 * np.abs(wanted).max()


def test_the_scores_never_lie_in_memory_at_once():
    q = jax.ShapeDtypeStruct((1, 4096, 8, 10), jnp.float32)
    gradient = jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2))
    for function in (attend, gradient):
        needed = jax.jit(function).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes
        assert needed < 8 * 4096 * 4096 * 4 / 20


def test_no_images():
    q = jnp.zeros((0, 1024, 2, 8))
    assert attend(q, q, q).shape == q.shape


@pytest.mark.parametrize("queries, fits", [(4096, True), (1221, True), (1031, False), (2062, False)])
def test_what_can_be_cut(queries, fits):
    assert blockwise.fits(queries) == fits
