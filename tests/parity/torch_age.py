"""AGE's losses in float64 PyTorch, written from the paper's description (docs/method.md) alone.

The networks are diffusers' and transformers' own (torch_aegis.py). `original` is theta0, `current` theta. Weights (C,)
mix the encodings of C words, (C, L, D), into the target's. at, kept: (z, t) as torch_aegis takes them.
"""

import torch

from tests.parity.torch_aegis import predict_noise, prompt_embedding


def mixture(pi, gumbel, temperature, form, top):
    """Weights by logits and noise: of one word with the gradient of the softmax, or of the likeliest few."""
    soft = torch.softmax((pi + gumbel) / temperature, dim=-1)
    if form == "hard":
        one = torch.zeros_like(soft)
        one[soft.argmax()] = 1.0
        return one + soft - soft.detach()
    chosen = soft * torch.zeros_like(soft).index_fill(0, torch.topk(soft, top).indices, 1.0)
    return chosen / chosen.sum()


def picture(pipeline, at, embedding):
    """x0 as the prediction has it."""
    z, t = at
    a = pipeline.alphas_cumprod[t].reshape(-1, *[1] * (z.ndim - 1))
    return (z - (1 - a).sqrt() * predict_noise(pipeline, z, t, embedding)) / a.sqrt()


def losses(original, current, words, c_t, at, kept, eta):
    """(L_e, L_p) that theta goes down, for the target's encoding c_t (1, L, D)."""
    c_e = prompt_embedding(original, None, words)
    with torch.no_grad():
        aim = picture(original, at, c_t)
        aim = aim - eta * (picture(original, at, c_e) - aim)
        stays = picture(original, kept, c_t)
    L_e = ((picture(current, at, c_e) - aim) ** 2).mean()
    return L_e, ((picture(current, kept, c_t) - stays) ** 2).mean()


def adversary(original, current, words, c_t, at, kept, weight):
    """What pi goes up, by c_t."""
    with torch.no_grad():
        now = picture(current, at, prompt_embedding(original, None, words))
    far = ((now - picture(original, at, c_t)) ** 2).mean()
    return far + weight * ((picture(current, kept, c_t) - picture(original, kept, c_t)) ** 2).mean()
