"""The one attention entry: XLA's own attention, or where it pays one that never writes all scores to memory.

Shapes: B batch, L query tokens, S key tokens, N heads, d head width.
"""

import functools
import warnings

import jax
import jax.numpy as jnp

from aegis_jax.models import blockwise

# Below this many query tokens the scores are small and a kernel gains little (SD 1.4 has 4096 and 1024).
_LONG = 1024
_LANES = 128  # of a TPU: a head is padded to a multiple
_BLOCKS = (512, 256, 128)  # tokens in one tile of the TPU's kernel


def attend(q_BLNd, k_BSNd, v_BSNd, *, causal: bool = False, flash: bool = True):
    """Scaled dot-product attention, softmax in float32. (B, L, N, d), (B, S, N, d) x 2 -> (B, L, N, d).

    Long sequences get cuDNN's kernel on NVIDIA GPUs, the flash kernel on TPUs and blocks of queries on CPUs, there only
    if the keys are 1024 or more too and the queries can be cut (blockwise.py; reverse mode only). Which one is settled
    when the program is lowered, so that a program compiled for an absent TPU has it too. flash=False keeps the TPU's
    kernel and the blocks out: XLA cannot split them over the devices of a mesh.
    """
    kernels = {}
    if q_BLNd.shape[1] >= _LONG and not causal:
        if flash and _block(q_BLNd, k_BSNd):
            kernels["tpu"] = _flash
        if _cudnn_takes(q_BLNd, k_BSNd):
            kernels["cuda"] = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        if flash and k_BSNd.shape[1] >= _LONG and blockwise.fits(q_BLNd.shape[1]):
            kernels["cpu"] = blockwise.attention
    if not kernels:
        return jax.nn.dot_product_attention(q_BLNd, k_BSNd, v_BSNd, is_causal=causal)
    return jax.lax.platform_dependent(q_BLNd, k_BSNd, v_BSNd, default=jax.nn.dot_product_attention, **kernels)


def _block(q, k) -> int | None:
    """Tile of the TPU's kernel, None where it does not fit: another type, cross-attention, an odd length."""
    if q.dtype != jnp.bfloat16 or q.shape[1] != k.shape[1]:
        return None
    return next((block for block in _BLOCKS if q.shape[1] % block == 0), None)


def _flash(q_BLNd, k_BLNd, v_BLNd):
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    d, block = q_BLNd.shape[3], _block(q_BLNd, k_BLNd)
    # Heads before tokens, as the kernel has them. Zeros in a head's padding change no score.
    padded = lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, 0), (0, -d % _LANES)))  # noqa: E731
    names = "q k_major k q_major_dkv k_major_dkv k_dkv q_dkv k_major_dq k_dq q_dq"
    blocks = tpu.BlockSizes(block_b=1, **{f"block_{name}": block for name in names.split()})
    out = tpu.flash_attention(*map(padded, (q_BLNd, k_BLNd, v_BLNd)), sm_scale=d**-0.5, block_sizes=blocks)
    return jnp.swapaxes(out[..., :d], 1, 2)


def _cudnn_takes(q, k) -> bool:
    """Whether this machine's GPU has cuDNN's kernel for such heads and lengths; no GPU, no kernel.

    Odd lengths, such as the 77 tokens of a prompt, cannot be differentiated: JAX (0.10 to 0.11) refuses them where
    there is a bias, and takes the placeholder of an absent one for a bias. Sampling, which takes no gradient, goes
    without the kernel too; what that costs has not been measured.
    """
    head_dim = q.shape[3]
    if q.dtype not in (jnp.float16, jnp.bfloat16) or head_dim % 8 or head_dim > 256:
        return False
    if q.shape[1] % 2 or k.shape[1] % 2:
        return False
    return _cudnn_works(q.dtype.name, head_dim)


@functools.cache
def _cudnn_works(dtype: str, head_dim: int) -> bool:
    """Tries it once, forward and backward: some installations fail only when it runs."""
    try:
        gpu = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return False
    if head_dim > 128 and float(gpu.compute_capability) < 9:
        return False
    try:
        # Also from within a trace, where this is called from.
        allowed = jax.transfer_guard("allow")  # else a guard of the caller's would pass for a failure
        with jax.ensure_compile_time_eval(), jax.default_device(gpu), allowed:
            x = jnp.ones((1, 64, 1, head_dim), dtype)
            attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
            jax.block_until_ready(jax.grad(lambda x: attention(x, x, x).astype(jnp.float32).sum())(x))
    except Exception as error:  # whatever an incomplete installation raises
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"cuDNN attention does not work here (heads of {head_dim}, {dtype}): {type(error).__name__}: {reason}; "
            "XLA's attention is used instead, slower and with more memory",
            stacklevel=2,
        )
        return False
    return True
