"""Which tensors an erasure may change, of the UNet or of the text encoder, and how the change (the drift) is put on top
of the frozen weights.
"""

from types import MappingProxyType

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


def precise(params: dict, trainable: str, dtype) -> dict:
    """{dotted path: float32} of the trainable tensors where `dtype`, which theta0 is computed in, rounds; else {}."""
    if dtype == jnp.float32:
        return {}
    return {path: jnp.asarray(x, jnp.float32) for path, x in select(params, trainable).items()}


def add_drift(params: dict, drift: dict, trainable: str, precise: dict = MappingProxyType({}), placement=None) -> dict:
    """theta = theta0 + d in the dtype of `params`, rounded once: d is added to `precise` where that is given.

    Tensors outside the trainable set are the same arrays as in `params`. placement: where the tensors of `params` lie
    on a mesh, and those of theta shall.
    """
    mine = select(params, trainable)
    dtypes = tuple((path, x.dtype) for path, x in mine.items())
    moved = _moved(dict(precise) or mine, drift, dtypes=dtypes, placement=placement)
    return unflatten(flatten(params) | moved)


# Compiled over the trainable tensors only: what passes through a compiled function comes out as a copy.
@program(static_argnames=("dtypes", "placement"))
def _moved(mine: dict, drift: dict, *, dtypes, placement) -> dict:
    drift = groups.unstack(drift, like=mine)
    moved = {path: (mine[path].astype(jnp.float32) + drift[path]).astype(dtype) for path, dtype in dtypes}
    # Left alone, a tensor would take after the split of the stack that its drift comes from: theta would lie elsewhere
    # than theta0, and every program that takes either would be compiled twice.
    return moved if placement is None else placement.tensors(moved)


def drift_by_path(params: dict, drift: dict, trainable: str) -> groups.Unstacked:
    """{dotted path: drift} of the trainable tensors of nested parameters, each array made when it is asked for."""
    return groups.Unstacked(drift, like=select(params, trainable))
