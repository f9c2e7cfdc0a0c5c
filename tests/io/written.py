"""What a written pipeline folder holds, as PyTorch reads it."""

import torch
from safetensors.torch import load_file


def unet_tensors(folder):
    merged = {}
    for path in sorted((folder / "unet").glob("*.safetensors")):
        merged |= load_file(path)
    return merged


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
