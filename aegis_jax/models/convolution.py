"""2-D convolution with a backward pass that a CPU runs fast; NHWC activations, HWIO kernels.

XLA's CPU backend runs the forward convolution near the speed of its matrix products, but the gradient with respect to
the kernel, a convolution with the batch in the channels' place, at a third of it. There the kernel's gradient is one
matrix product per kernel position instead. Other backends keep XLA's own.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from aegis_jax.models import initial
from aegis_jax.models.model import full_precision

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(x_BHWC, kernel, strides: tuple[int, int], padding: tuple[tuple[int, int], ...]):
    """(B, H, W, C_in) and (kh, kw, C_in, C_out) -> (B, H', W', C_out), as `jax.lax.conv_general_dilated`."""
    if kernel.shape[:2] == (1, 1) and strides == (1, 1) and not any(map(any, padding)):
        return x_BHWC @ kernel[0, 0]
    return _convolve(x_BHWC, kernel, strides, padding)


def _native(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)


_convolve = jax.custom_vjp(_native, nondiff_argnums=(2, 3))


def _forward(x, kernel, strides, padding):
    return _native(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, dy):
    x, kernel = saved
    with full_precision(x.dtype):  # traced after the caller's own context is over
        (dx,) = jax.vjp(lambda x: _native(x, kernel, strides, padding), x)[1](dy)
        dkernel = jax.lax.platform_dependent(
            x,
            dy,
            cpu=partial(_kernel_gradient, size=kernel.shape[:2], strides=strides, padding=padding),
            default=lambda x, dy: jax.vjp(lambda k: _native(x, k, strides, padding), kernel)[1](dy)[0],
        )
    return dx, dkernel


def _kernel_gradient(x, dy, *, size, strides, padding):
    """sum over the batch and the output's pixels of x (moved by the kernel's position) times dy."""
    _, H, W, _ = dy.shape
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def at(i, j):
        rows = slice(i, i + strides[0] * (H - 1) + 1, strides[0])
        columns = slice(j, j + strides[1] * (W - 1) + 1, strides[1])
        moved = padded[:, rows, columns]
        return moved.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])

    return jnp.stack([jnp.stack([at(i, j) for j in range(size[1])]) for i in range(size[0])])


_convolve.defvjp(_forward, _backward)


def Conv(n_in: int, n_out: int, kernel: tuple[int, int], *, strides=1, padding=((0, 0), (0, 0)), rngs) -> nnx.Conv:
    """`nnx.Conv` that computes with `convolve`; `padding` in pixels, ((top, bottom), (left, right))."""
    return initial.Conv(
        n_in, n_out, kernel, strides=strides, padding=padding, conv_general_dilated=_as_nnx_calls_it, rngs=rngs
    )


def _as_nnx_calls_it(x, kernel, strides, padding, **unused):
    return convolve(x, kernel, tuple(strides), tuple(map(tuple, padding)))
