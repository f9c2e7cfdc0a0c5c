"""AdvUnlearn's two losses in float64 PyTorch, written from the paper's description (docs/method.md) alone.

The networks are diffusers' and transformers' own (torch_aegis.py). `original` is theta0, `current` theta: pipelines
that differ in the text encoder, or in the UNet. Soft tokens p (k, d) stand before the concept's words.
"""

import torch

from tests.parity.torch_aegis import mse, predict_noise, prompt_embedding


def attack_loss(original, current, words, p, at):
    """What the adversary minimises: theta's prediction for his prompt against theta0's for the concept."""
    with torch.no_grad():
        wanted = predict_noise(original, *at, prompt_embedding(original, None, words))
    return mse(predict_noise(current, *at, prompt_embedding(current, p, words)) - wanted)


def erasure_loss(original, current, words, p, at, eta):
    """ESD's, for the adversary's prompt: away from the concept, seen from the empty prompt. p None: the plain one."""
    with torch.no_grad():
        empty = predict_noise(original, *at, prompt_embedding(original, None, []))
        concept = predict_noise(original, *at, prompt_embedding(original, None, words))
    target = empty - eta * (concept - empty)
    return mse(predict_noise(current, *at, prompt_embedding(current, p, words)) - target)


def retention_loss(original, current, prompts, at):
    """Latent i belongs to prompt i: as theta0 draws it, so shall theta."""
    total = 0.0
    for i, words in enumerate(prompts):
        one = tuple(x[i : i + 1] for x in at)
        with torch.no_grad():
            wanted = predict_noise(original, *one, prompt_embedding(original, None, words))
        total = total + mse(predict_noise(current, *one, prompt_embedding(current, None, words)) - wanted)
    return total / len(prompts)


def gradients(loss, module, keys):
    """{key: gradient} by the parameters of a module with these names."""
    parameters = dict(module.named_parameters())
    chosen = [parameters[key] for key in keys]
    return dict(zip(keys, torch.autograd.grad(loss, chosen), strict=True))
