"""PyTorch modules -> our parameters, for the parity tests only.

Written apart from aegis_jax.io on purpose: what becomes of a tensor is decided by the kind of the
PyTorch module that owns it, so the parity tests do not lean on the converter they would excuse.
"""

import numpy as np
import torch
from torch import nn

_LEAVES = {
    nn.Conv2d: ("kernel", lambda w: w.transpose(2, 3, 1, 0)),
    nn.Linear: ("kernel", lambda w: w.T),
    nn.GroupNorm: ("scale", lambda w: w),
    nn.LayerNorm: ("scale", lambda w: w),
    nn.Embedding: ("embedding", lambda w: w),
}


def convert(module: nn.Module, tensor_of=lambda parameter: parameter) -> dict[str, np.ndarray]:
    """Every parameter as `{dotted path: array}` in our layout.

    `tensor_of` picks what is converted: the parameter itself, or its gradient.
    """
    flat = {}
    for path, owner in module.named_modules():
        parameters = dict(owner.named_parameters(recurse=False))
        if not parameters:
            continue
        kind = next(kind for kind in _LEAVES if isinstance(owner, kind))
        leaf, layout = _LEAVES[kind]
        for name, parameter in parameters.items():
            array = tensor_of(parameter).detach().numpy()
            flat[f"{path}.{leaf if name == 'weight' else name}"] = layout(array) if name == "weight" else array
    assert len(flat) == len(list(module.parameters()))
    return flat


def gradients(module: nn.Module) -> dict[str, np.ndarray]:
    """The gradients that `backward` left, as `{dotted path: array}` in our layout."""
    return convert(module, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Gives norms and biases values that matter: no mix-up can hide behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                offset = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(offset + 0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()
