"""Multi-head attention, and the transformer blocks built on it.

Shapes: B batch, L query tokens, S key tokens, N heads, d head width, D model width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from aegis_jax.models import initial
from aegis_jax.models.attend import attend
from aegis_jax.models.convolution import Conv


class Attention(nnx.Module):
    """Multi-head attention with diffusers' names (`to_q`, `to_k`, `to_v`, `to_out.0`)."""

    def __init__(self, width, context_width, heads, head_dim, *, qkv_bias=False, rngs):
        inner = heads * head_dim
        self.heads = heads
        self.flash = True
        self.to_q = initial.Linear(width, inner, use_bias=qkv_bias, rngs=rngs)
        self.to_k = initial.Linear(context_width, inner, use_bias=qkv_bias, rngs=rngs)
        self.to_v = initial.Linear(context_width, inner, use_bias=qkv_bias, rngs=rngs)
        self.to_out = nnx.List([initial.Linear(inner, width, rngs=rngs)])

    def __call__(self, x_BLD, context_BSD):
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # noqa: E731
        q, k, v = split(self.to_q(x_BLD)), split(self.to_k(context_BSD)), split(self.to_v(context_BSD))
        out = attend(q, k, v, flash=self.flash)
        return self.to_out[0](out.reshape(*out.shape[:2], -1))


class GEGLU(nnx.Module):
    def __init__(self, width, inner, *, rngs):
        self.proj = initial.Linear(width, 2 * inner, rngs=rngs)

    def __call__(self, x):
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, width, *, rngs):
        # Position 1 is diffusers' dropout: it holds no parameters and does nothing at inference.
        self.net = nnx.List(
            [GEGLU(width, 4 * width, rngs=rngs), nnx.List([]), initial.Linear(4 * width, width, rngs=rngs)]
        )

    def __call__(self, x):
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward, each after a LayerNorm and added to its input."""

    def __init__(self, width, context_width, heads, head_dim, *, only_cross_attention, rngs):
        self.only_cross_attention = only_cross_attention
        norm = lambda: initial.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)  # noqa: E731
        self_width = context_width if only_cross_attention else width
        self.norm1 = norm()
        self.attn1 = Attention(width, self_width, heads, head_dim, rngs=rngs)
        self.norm2 = norm()
        self.attn2 = Attention(width, context_width, heads, head_dim, rngs=rngs)
        self.norm3 = norm()
        self.ff = FeedForward(width, rngs=rngs)

    def __call__(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, context if self.only_cross_attention else h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer over the pixels of a feature map, (B, h, w, C) -> (B, h, w, C), with a residual around it.

    SD 1.x projects in and out with 1x1 convolutions, SD 2.x (`use_linear_projection`) with dense layers: the same
    arithmetic in NHWC, but differently shaped weights in the file. The GroupNorm eps is 1e-6 here (1e-5 elsewhere).
    """

    def __init__(
        self, channels, context_width, heads, head_dim, *, layers, groups, linear_projection, only_cross_attention, rngs
    ):
        inner = heads * head_dim
        self.norm = initial.GroupNorm(channels, num_groups=groups, epsilon=1e-6, use_fast_variance=False, rngs=rngs)

        def projection(n_in, n_out):
            if linear_projection:
                return initial.Linear(n_in, n_out, rngs=rngs)
            return Conv(n_in, n_out, (1, 1), rngs=rngs)

        self.proj_in = projection(channels, inner)
        self.transformer_blocks = nnx.List(
            BasicTransformerBlock(
                inner, context_width, heads, head_dim, only_cross_attention=only_cross_attention, rngs=rngs
            )
            for _ in range(layers)
        )
        self.proj_out = projection(inner, channels)

    def __call__(self, x_BHWC, context_BSD):
        B, H, W, _ = x_BHWC.shape
        x = self.proj_in(self.norm(x_BHWC))
        tokens = x.reshape(B, H * W, -1)
        for block in self.transformer_blocks:
            tokens = block(tokens, context_BSD)
        return self.proj_out(tokens.reshape(B, H, W, -1)) + x_BHWC
