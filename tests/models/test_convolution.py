"""The convolution against XLA's own: outputs, both gradients, under vmap, for every padding and stride in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.models.convolution import convolve

CASES = {
    "3x3": ((2, 5, 7, 3), (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1))),
    "1x1": ((2, 5, 7, 3), (1, 1, 3, 4), (1, 1), ((0, 0), (0, 0))),
    "1x1 padded": ((2, 5, 7, 3), (1, 1, 3, 4), (1, 1), ((1, 1), (0, 0))),
    "stride 2": ((2, 6, 7, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1))),
    "stride 2, one-sided": ((1, 6, 7, 3), (3, 3, 3, 2), (2, 2), ((0, 1), (0, 1))),
    "5x5": ((1, 6, 6, 2), (5, 5, 2, 3), (1, 1), ((2, 2), (2, 2))),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_xla(case):
    shape, kernel_shape, strides, padding = CASES[case]
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, kernel_shape))

    def xla(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def run(f):
        y, back = jax.vjp(f, x, kernel)
        weight = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), jnp.float32)
        return y, *back(weight)

    ours = run(lambda x, kernel: convolve(x, kernel, strides, padding))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), ours, run(xla))


def test_gradients_under_vmap():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 2, 4, 4, 2)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 2, 2)), jnp.float32)
    gradient = jax.grad(lambda x, k: jnp.sum(convolve(x, k, (1, 1), ((1, 1), (1, 1))) ** 2), argnums=(0, 1))
    batched = jax.vmap(gradient)(x, kernel)
    for i in range(3):
        one = gradient(x[i], kernel[i])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4), batched, one)  # noqa: B023
