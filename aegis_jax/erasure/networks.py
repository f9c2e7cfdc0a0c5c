"""The networks as a gradient method takes them: theta0 in the compute type, the text encoder in float32."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.conditioning import Conditioning, encode, encode_tokens
from aegis_jax.diffusion.predict import predict
from aegis_jax.diffusion.schedule import Schedule, make_schedule
from aegis_jax.erasure import groups, trainable
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.programs import program, pytree
from aegis_jax.erasure.texts import check_text_width
from aegis_jax.errors import AegisError
from aegis_jax.models import clip
from aegis_jax.models import unet as unet_lib
from aegis_jax.models.model import Graph, compute_dtype, flatten, unflatten
from aegis_jax.models.unet_config import native_size

SETUP = 2**32 - 1  # a step's keys are folds 0, 1, 2, ... of the seed; the largest fold is the setup's

embed_ids = jax.jit(clip.embed, static_argnums=0)
encode_rows = jax.jit(encode_tokens, static_argnums=0)


@pytree(data="unet low_bits text schedule empty_emb word_ids", meta="unet_graph text_graph latent_shape placement")
@dataclasses.dataclass(frozen=True)
class Networks:
    """What every gradient method reads of a pipeline; with the drift added (`moved`), what it has made of it.

    Attributes:
      unet: nested parameters in the compute dtype. text: the text encoder's, float32.
      low_bits: what rounding theta0 to the compute dtype has taken from the UNet's trainable tensors
        (trainable.low_bits): the drift is added before the rounding, so that no step is lost in it.
      empty_emb: c_0 of theta0, one row.
      word_ids: token ids that soft tokens start from, (W,) int32.
      latent_shape: (h, w, C) of z.
      placement: None on one device, else says where a batch and a tensor lie (parallel.mesh.Placement).
    """

    unet: dict
    low_bits: dict
    text: dict
    schedule: Schedule
    empty_emb: Conditioning
    word_ids: jax.Array
    unet_graph: Graph
    text_graph: Graph
    latent_shape: tuple[int, int, int]
    placement: Any = None


def networks(pipeline, trainable_set: str, dtype: str, grid: int, placement=None) -> Networks:
    """From a pipeline, not yet placed. dtype: name of the compute type; grid: DDIM steps of a trajectory.

    Raises `AegisError` for an inpainting-like UNet, a text encoder that is not the UNet's, and a grid that does not
    fit the schedule.
    """
    unet, in_float32 = pipeline.unet, with_text_in_float32(pipeline)
    shape = latent_shape(unet.config)
    check_text_width(unet.config, pipeline.text_encoder.params)
    schedule = make_schedule(pipeline.scheduler)
    _check_grid(schedule.alphas_cumprod.shape[0], grid)
    dtype = compute_dtype(dtype)
    return Networks(
        unet=jax.tree.map(lambda x: jnp.asarray(x, dtype), unet.params),
        low_bits=trainable.low_bits(unet.params, trainable_set, dtype),
        text=in_float32.text_encoder.params,
        schedule=schedule,
        empty_emb=encode(in_float32, ""),
        word_ids=jnp.asarray(pipeline.tokenizer.word_ids, jnp.int32),
        unet_graph=unet.graph if placement is None else unet_lib.without_flash(unet.graph, unet.params),
        text_graph=pipeline.text_encoder.graph,
        latent_shape=shape,
        placement=placement,
    )


def refuse_mesh(config, placement) -> None:
    """Raises `AegisError` where a method that trains on one device was given several."""
    if placement is not None:
        raise AegisError(f"method={config.method} trains on one device: leave mesh.data and mesh.fsdp at 1")


def with_text_in_float32(pipeline):
    """The pipeline with its text encoder's parameters in float32."""
    text = pipeline.text_encoder
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), text.params)
    return dataclasses.replace(pipeline, text_encoder=dataclasses.replace(text, params=params))


def trained(net: Networks, trainable_set: str) -> dict:
    """The nested parameters that the set is of: the text encoder's or the UNet's."""
    return net.text if trainable_set == trainable.TEXT_ENCODER else net.unet


def with_trained(net: Networks, trainable_set: str, params: dict) -> Networks:
    """`net` with these in the place of `trained`."""
    return dataclasses.replace(net, **{"text" if trainable_set == trainable.TEXT_ENCODER else "unet": params})


def moved(net: Networks, drift: dict, trainable_set: str) -> Networks:
    """theta = theta0 + drift; what is not trained are the same arrays."""
    params = trained(net, trainable_set)
    params = trainable.add_drift(params, drift, trainable_set, net.low_bits, net.placement)
    return with_trained(net, trainable_set, params)


def noise(net: Networks, at: Noised, cond: Conditioning, *, remat: bool = False):
    """eps of `net` (B, h, w, C) at latents B, latent i under row i mod G of cond."""
    return predict(net.unet_graph, net.unet, net.schedule, at.z, at.t, cond, remat=remat)


@program
def predicted(net: Networks, at: Noised, cond: Conditioning):
    """`noise` as a program of its own."""
    return noise(net, at, cond)


def encoded(net: Networks, tokens) -> Conditioning:
    """Token embeddings (n, L, d) by the text encoder of `net`: n rows."""
    return encode_tokens(net.text_graph, net.text, tokens)


def gradients(net: Networks, trainable_set: str, loss: Callable):
    """(what `loss` gives beside its value, its gradient by the trained tensors, stacked by group).

    loss: `Networks` -> (scalar, anything).
    """
    params = trained(net, trainable_set)
    flat = flatten(params)
    of_tensors = lambda tensors: loss(with_trained(net, trainable_set, unflatten(flat | tensors)))  # noqa: E731
    found, beside = jax.grad(of_tensors, has_aux=True)(trainable.select(params, trainable_set))
    # Tensor by tensor, so that each may be freed early; without it XLA's CPU backend fuses the backward pass into
    # what follows and compiles for minutes.
    return beside, groups.stack(jax.tree.map(jax.lax.optimization_barrier, found))


def latent_shape(config: dict) -> tuple[int, int, int]:
    """(h, w, C) of a UNet's config.json. Raises `AegisError` for one that needs more than a prompt."""
    size, channels = native_size(config) or (64, 64), config.get("in_channels", 4)
    if channels != config.get("out_channels", 4):
        raise AegisError(
            f"unet/config.json: in_channels={channels} but out_channels={config.get('out_channels', 4)}; only "
            "text-to-image UNets can be erased from"
        )
    return (*size, channels)


def _check_grid(train_timesteps: int, steps: int) -> None:
    stride = train_timesteps // steps
    if stride == 0 or 1 + stride * (steps - 1) >= train_timesteps:
        raise AegisError(
            f"latents.steps={steps} does not fit a schedule of {train_timesteps} timesteps; take fewer, such as 50"
        )
