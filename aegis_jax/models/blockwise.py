"""Attention for CPUs that never writes all scores to memory: one head after the other, some queries at a time.

At 64x64 latents SD 1.4's self-attention has 4096 x 4096 scores in each of 8 heads, half a gigabyte a latent, and XLA
passes over them several times. Some rows of them stay in the cache. The backward pass computes them again
(Dao et al., FlashAttention, 2022, algorithm 4), transposed, so that every product but one has its operands as they lie.

Shapes: B batch, L query tokens, S key tokens, N heads, d head width.
"""

import jax
import jax.numpy as jnp

# Queries at a time: with 4096 keys 8 MB of scores forward; backward there are three such arrays, of 4 MB.
_FORWARD, _BACKWARD = 512, 256
_LEAST = 16  # fewer are not worth a product


def fits(queries: int) -> bool:
    """Whether so many queries can be cut into equal blocks of a useful size."""
    return _block(queries, _BACKWARD) >= _LEAST


def _block(queries: int, most: int) -> int:
    return next(size for size in range(most, 0, -1) if queries % size == 0)


def attention(q_BLNd, k_BSNd, v_BSNd):
    """softmax(q k^T / sqrt(d)) v, computed in float32; (B, L, N, d), (B, S, N, d) x 2 -> (B, L, N, d).

    Differentiable in reverse mode only.
    """
    B, L, N, d = q_BLNd.shape
    by_head = lambda x: jnp.swapaxes(x, 1, 2).reshape(B * N, x.shape[1], d).astype(jnp.float32)  # noqa: E731
    q, k, v = map(by_head, (q_BLNd, k_BSNd, v_BSNd))
    out = jax.lax.map(lambda qkv: _head(*qkv), (q * d**-0.5, k, v))
    return jnp.swapaxes(out.reshape(B, N, L, d), 1, 2).astype(q_BLNd.dtype)


def _cut(x, most: int):
    size = _block(len(x), most)
    return x.reshape(-1, size, *x.shape[1:])


@jax.custom_vjp
def _head(q_Ld, k_Sd, v_Sd):
    return _forward(q_Ld, k_Sd, v_Sd)[0]


def _forward(q_Ld, k_Sd, v_Sd):
    k_dS = k_Sd.T

    def block(q_ld):
        scores_lS = q_ld @ k_dS
        most_l1 = scores_lS.max(-1, keepdims=True)
        weights_lS = jnp.exp(scores_lS - most_l1)
        total_l1 = weights_lS.sum(-1, keepdims=True)
        return (weights_lS @ v_Sd) / total_l1, (most_l1 + jnp.log(total_l1))[:, 0]

    out_Ld, log_total_L = (x.reshape(len(q_Ld), *x.shape[2:]) for x in jax.lax.map(block, _cut(q_Ld, _FORWARD)))
    return out_Ld, (q_Ld, k_Sd, v_Sd, out_Ld, log_total_L)


def _backward(kept, g_Ld):
    q_Ld, k_Sd, v_Sd, out_Ld, log_total_L = kept
    k_dS, mean_L = k_Sd.T, (g_Ld * out_Ld).sum(-1)

    def block(sums, rows):
        dk_Sd, dv_Sd = sums
        q_ld, g_ld, log_total_l, mean_l = rows
        weights_Sl = jnp.exp(k_Sd @ q_ld.T - log_total_l[None])
        dscores_Sl = weights_Sl * (v_Sd @ g_ld.T - mean_l[None])
        return (dk_Sd + dscores_Sl @ q_ld, dv_Sd + weights_Sl @ g_ld), (k_dS @ dscores_Sl).T

    zero = jnp.zeros_like(k_Sd), jnp.zeros_like(v_Sd)
    rows = tuple(_cut(x, _BACKWARD) for x in (q_Ld, g_Ld, log_total_L, mean_L))
    (dk_Sd, dv_Sd), dq = jax.lax.scan(block, zero, rows)
    return dq.reshape(q_Ld.shape), dk_Sd, dv_Sd


_head.defvjp(_forward, _backward)
