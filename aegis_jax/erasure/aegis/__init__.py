"""AEGIS, and all that lies between it and ESD, as one method with settings (`method`). Read step.py first."""

from aegis_jax.erasure import groups, trainable
from aegis_jax.erasure.aegis.config import EraseConfig, check
from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.erasure.aegis.step import erase_step
from aegis_jax.erasure.method import Method
from aegis_jax.models.layout import torch_key


def changed(pipeline, state, config: EraseConfig) -> dict:
    """{"unet": parameters}: theta0 + d on the pipeline's own, trainable tensors float32, the others as they are."""
    return {"unet": trainable.merged(pipeline.unet.params, state.drift, config.trainable)}


def tensors(pipeline, config: EraseConfig) -> list[str]:
    """PyTorch keys of the trained tensors, in the order of a step's "per_tensor"."""
    return [torch_key(path) for path in groups.order(trainable.select(pipeline.unet.params, config.trainable))]


method = Method(EraseConfig(), check, setup, erase_step, changed, tensors)
