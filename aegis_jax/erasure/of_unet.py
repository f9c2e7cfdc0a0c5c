"""What a method that trains tensors of the UNet alone says of its result."""

from aegis_jax.erasure import groups, trainable
from aegis_jax.models.layout import torch_key


def drift(pipeline, state, config) -> dict:
    """{"unet": {path: theta - theta0}} of the trained tensors."""
    return {"unet": trainable.drift_by_path(pipeline.unet.params, state.drift, config.trainable)}


def tensors(pipeline, config) -> list[str]:
    """PyTorch keys of the trained tensors, in the order of a step's "per_tensor"."""
    return [torch_key(path) for path in groups.order(trainable.select(pipeline.unet.params, config.trainable))]
