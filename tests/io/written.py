"""What a written pipeline folder holds, as PyTorch reads it; and a pipeline with a UNet that was changed."""

import dataclasses

import torch
from safetensors.torch import load_file

from aegis_jax.models.model import flatten, unflatten


def unet_tensors(folder):
    merged = {}
    for path in sorted((folder / "unet").glob("*.safetensors")):
        merged |= load_file(path)
    return merged


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def files(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def changed_unet(loaded, changes):
    """The pipeline with {leaf path: new value} in its UNet."""
    leaves = flatten(loaded.unet.params) | changes
    unet = dataclasses.replace(loaded.unet, params=unflatten(leaves))
    return dataclasses.replace(loaded, unet=unet)
