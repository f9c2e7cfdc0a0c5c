"""Convolutional building blocks shared by the UNet and the VAE; NHWC throughout. Names are diffusers'."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aegis_jax.errors import AegisError
from aegis_jax.models import initial
from aegis_jax.models.convolution import Conv

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


def group_norm(channels, groups, eps, rngs):
    # Two-pass variance: the one-pass formula loses digits where the mean is large, and parity with it.
    return initial.GroupNorm(channels, num_groups=groups, epsilon=eps, use_fast_variance=False, rngs=rngs)


def conv(n_in, n_out, kernel, rngs):
    """Stride-1 convolution padded as PyTorch does for an odd kernel: (kernel - 1) // 2 on each side."""
    pad = (kernel - 1) // 2
    return Conv(n_in, n_out, (kernel, kernel), padding=((pad, pad), (pad, pad)), rngs=rngs)


class ResnetBlock2D(nnx.Module):
    """GroupNorm - activation - conv, twice, with the time embedding added (or scale-shifted) in between."""

    def __init__(
        self,
        n_in,
        n_out,
        *,
        time_width=None,
        groups,
        groups_out=None,
        eps,
        act,
        scale_shift=False,
        output_scale=1.0,
        rngs,
    ):
        self.act = act
        self.scale_shift = scale_shift
        self.output_scale = output_scale
        self.norm1 = group_norm(n_in, groups, eps, rngs)
        self.conv1 = conv(n_in, n_out, 3, rngs)
        if time_width is not None:
            self.time_emb_proj = initial.Linear(time_width, 2 * n_out if scale_shift else n_out, rngs=rngs)
        self.norm2 = group_norm(n_out, groups_out or groups, eps, rngs)
        self.conv2 = conv(n_out, n_out, 3, rngs)
        self.has_shortcut = n_in != n_out
        if self.has_shortcut:
            self.conv_shortcut = Conv(n_in, n_out, (1, 1), rngs=rngs)

    def __call__(self, x, temb=None):
        act = ACTIVATIONS[self.act]
        h = self.conv1(act(self.norm1(x)))
        if temb is None:
            h = self.norm2(h)
        else:
            t = self.time_emb_proj(act(temb))[:, None, None]
            if self.scale_shift:
                scale, shift = jnp.split(t, 2, axis=-1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + t)
        h = self.conv2(act(h))
        shortcut = self.conv_shortcut(x) if self.has_shortcut else x
        return (shortcut + h) / self.output_scale


class Downsample2D(nnx.Module):
    """Stride-2 3x3 convolution. Padding 0 stands for diffusers' asymmetric (0, 1), which the VAE uses."""

    def __init__(self, channels, *, padding, rngs):
        pad = (0, 1) if padding == 0 else (padding, padding)
        self.conv = Conv(channels, channels, (3, 3), strides=2, padding=(pad, pad), rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour upsampling (by 2, or to `size`) and a 3x3 convolution."""

    def __init__(self, channels, *, rngs):
        self.conv = conv(channels, channels, 3, rngs)

    def __call__(self, x, size=None):
        for axis in (1, 2):
            n_in = x.shape[axis]
            n_out = 2 * n_in if size is None else size[axis - 1]
            # PyTorch's rule floor(i * in / out), in float32 as PyTorch computes it.
            index = np.floor(np.arange(n_out, dtype=np.float32) * np.float32(n_in / n_out)).astype(np.int32)
            x = jnp.repeat(x, 2, axis=axis) if n_out == 2 * n_in else jnp.take(x, np.minimum(index, n_in - 1), axis)
        return self.conv(x)


class TimestepEmbedding(nnx.Module):
    def __init__(self, n_in, n_out, *, act, post_act=None, rngs):
        self.act, self.post_act = act, post_act
        self.linear_1 = initial.Linear(n_in, n_out, rngs=rngs)
        self.linear_2 = initial.Linear(n_out, n_out, rngs=rngs)

    def __call__(self, x):
        x = self.linear_2(ACTIVATIONS[self.act](self.linear_1(x)))
        return x if self.post_act is None else ACTIVATIONS[self.post_act](x)


def sinusoidal(t_B, width, *, flip_sin_to_cos, freq_shift):
    """Timestep features (B,) -> (B, width), float32 (diffusers' `get_timestep_embedding`)."""
    half = width // 2
    exponent = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = t_B.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None]
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


def per_block(value, blocks: int, name: str) -> list:
    """A config entry that may be one value or a list with one value per block -> the list."""
    if not isinstance(value, (list, tuple)):
        return [value] * blocks
    if len(value) != blocks:
        raise AegisError(f"config: {name} has {len(value)} entries for {blocks} blocks: {list(value)}")
    return list(value)


def refuse(problems: list[str], what: str) -> None:
    """Raises one `AegisError` naming every unsupported option, if there is any."""
    if problems:
        raise AegisError(f"{what} config asks for what aegis_jax does not support: {'; '.join(problems)}")


def check_activation(name, option: str, problems: list[str]) -> None:
    if name not in ACTIVATIONS:
        problems.append(f"{option}={name!r} (supported: {', '.join(ACTIVATIONS)})")
