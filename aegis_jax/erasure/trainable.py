"""Which tensors an erasure may change, of the UNet or of the text encoder, and how the change (the drift) is put on top
of the frozen weights.
"""

from types import MappingProxyType

import jax
import jax.numpy as jnp

from aegis_jax.erasure import groups
from aegis_jax.erasure.programs import program
from aegis_jax.models.model import flatten, unflatten

# ESD's noxattn leaves out the cross-attention and the two ends of the network that see every prompt.
_NOT_NOXATTN = ("time_embedding.", "conv_norm_out.", "conv_out.")
TEXT_ENCODER = "text_encoder"  # the one set that is not the UNet's
UNET = ("full", "xattn", "noxattn", "layers", "kv")


def is_trainable(path: str, trainable: str) -> bool:
    """Whether the tensor at a dotted path of the UNet, or of the text encoder, belongs to the set.

    full: every tensor (paper); xattn: cross-attention (attn2); kv: its keys and values; noxattn: everything but
    attn2, the time embedding and the output layers (ESD's definition); layers: every linear layer and convolution
    outside attn2, without norms (ESD's code of 2025). text_encoder: its layers and final norm without the embeddings
    (AdvUnlearn), and nothing of the UNet.
    """
    if trainable == TEXT_ENCODER:
        return path.startswith(("text_model.encoder.", "text_model.final_layer_norm."))
    in_cross_attention = ".attn2." in path
    return {
        "full": True,
        "xattn": in_cross_attention,
        "kv": in_cross_attention and (".to_k." in path or ".to_v." in path),
        "noxattn": not in_cross_attention and not path.startswith(_NOT_NOXATTN),
        "layers": not in_cross_attention and "norm" not in path,
    }[trainable]


def select(params: dict, trainable: str) -> dict:
    """The trainable tensors of nested parameters: {dotted path: leaf}."""
    return {path: leaf for path, leaf in flatten(params).items() if is_trainable(path, trainable)}


def zero_drift(params: dict, trainable: str) -> dict:
    """The drift d = theta - theta0 at step 0: float32 zeros for the trainable tensors, stacked (groups.py)."""
    return groups.stack({path: jnp.zeros(x.shape, jnp.float32) for path, x in select(params, trainable).items()})


def low_bits(params: dict, trainable: str, dtype) -> dict:
    """{dotted path: int16} of the trainable tensors where `dtype`, which theta0 is computed in, rounds; else {}: what
    their bits in float32 have more than those of the rounded tensor, half as many bytes as float32 itself. Where
    rounding was a tie that went down they are one unit short."""
    if dtype == jnp.float32:
        return {}
    return {path: _low_bits(x) for path, x in select(params, trainable).items()}


def _bits(rounded):
    """Those of bfloat16, as the upper half of float32's, int32."""
    return jax.lax.bitcast_convert_type(rounded, jnp.uint16).astype(jnp.int32) << 16


@jax.jit
def _low_bits(x):
    bits = jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.float32), jnp.int32)
    return jnp.clip(bits - _bits(jnp.asarray(x, jnp.bfloat16)), -(2**15), 2**15 - 1).astype(jnp.int16)


def _in_float32(x, low):
    return jax.lax.bitcast_convert_type(_bits(x) + low.astype(jnp.int32), jnp.float32)


def add_drift(params: dict, drift: dict, trainable: str, low: dict = MappingProxyType({}), placement=None) -> dict:
    """theta = theta0 + d in the dtype of `params`, rounded once: d is added in float32 to theta0 with its `low_bits`,
    where these are given.

    Tensors outside the trainable set are the same arrays as in `params`. placement: where the tensors of `params` lie
    on a mesh, and those of theta shall.
    """
    mine = select(params, trainable)
    moved = _moved(mine, dict(low), drift, placement=placement)
    return unflatten(flatten(params) | moved)


# Compiled over the trainable tensors only: what passes through a compiled function comes out as a copy.
@program(static_argnames="placement")
def _moved(mine: dict, low: dict, drift: dict, *, placement) -> dict:
    drift = groups.unstack(drift, like=mine)
    exact = {path: _in_float32(x, low[path]) if low else x.astype(jnp.float32) for path, x in mine.items()}
    moved = {path: (exact[path] + drift[path]).astype(x.dtype) for path, x in mine.items()}
    # Left alone, a tensor would take after the split of the stack that its drift comes from: theta would lie elsewhere
    # than theta0, and every program that takes either would be compiled twice.
    return moved if placement is None else placement.tensors(moved)


def drift_by_path(params: dict, drift: dict, trainable: str) -> groups.Unstacked:
    """{dotted path: drift} of the trainable tensors of nested parameters, each array made when it is asked for."""
    return groups.Unstacked(drift, like=select(params, trainable))
