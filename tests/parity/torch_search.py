"""Searches for words in float64 PyTorch, from the published descriptions: what aegis_jax/attacks/search.py is held to.

The optimisers are PyTorch's own, the projection sorts, the networks are diffusers' and transformers'. Random draws
(noise, timesteps, tokens drawn from the simplex) are given, so that both sides see the same.
"""

import numpy as np
import torch

from tests.parity.torch_aegis import embed, encode, predict_noise


def simplex(row):
    """The nearest row of probabilities, by sorting."""
    ordered = row.sort(descending=True).values
    mu = (ordered.cumsum(0) - 1) / torch.arange(1, len(row) + 1)
    return (row - mu[ordered > mu][-1]).clamp(min=0)


def steps(erased, prompt, z_0, draws, *, place, start, optimiser, original=None):
    """(losses, the variable after each step, tokens of each step) of one row.

    prompt: token ids of the original prompt. place: token ids -> those around learnt embeddings (before, behind).
    start: the variable, (k, V) on the simplex or (k, d). draws: (t, noise (h, w, C), tokens (k,) or None) of each step;
    with tokens the variable lies on the simplex, without it is embeddings. original: whose prediction is the goal.
    """
    tokenizer, body = erased.tokenizer, getattr(erased.text_encoder, "text_model", erased.text_encoder)
    table = body.embeddings.token_embedding.weight
    variable = torch.tensor(np.asarray(start), dtype=torch.float64, requires_grad=True)
    optimiser = optimiser([variable])
    z_0 = torch.tensor(np.asarray(z_0), dtype=torch.float64)
    losses, variables, taken = [], [], []
    for t, noise, tokens in draws:
        if tokens is None:
            nearest = torch.nn.functional.cosine_similarity(variable[:, None], table[None], dim=-1).argmax(-1)
            leaf = table[nearest].detach().requires_grad_(True)
            learnt = leaf
        else:
            nearest = torch.tensor(np.asarray(tokens), dtype=torch.long)
            leaf = torch.nn.functional.one_hot(nearest, len(table)).double().requires_grad_(True)
            learnt = leaf @ table
        before, behind = place(prompt)
        row = [embed(erased.text_encoder, [tokenizer.bos_token_id, *before]), learnt]
        length = 1 + len(before) + len(learnt)
        tail = [*behind, tokenizer.eos_token_id]
        tail += [tokenizer.pad_token_id] * (tokenizer.model_max_length - length - len(tail))
        text = encode(erased.text_encoder, torch.cat([*row, embed(erased.text_encoder, tail)])[None])
        noise = torch.tensor(np.asarray(noise), dtype=torch.float64)
        a, t = erased.alphas_cumprod[int(t)], torch.tensor([int(t)])
        z_t = (a.sqrt() * z_0 + (1 - a).sqrt() * noise)[None]
        goal = noise[None]
        if original is not None:
            words = [tokenizer.bos_token_id, *prompt, tokenizer.eos_token_id]
            words += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(words))
            with torch.no_grad():
                text_0 = encode(original.text_encoder, embed(original.text_encoder, words)[None])
                goal = predict_noise(original, z_t, t, text_0)
        loss = (predict_noise(erased, z_t, t, text) - goal).square().mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        variable.grad = gradient if tokens is None else torch.nn.functional.hardtanh(gradient)
        optimiser.step()
        if tokens is not None:
            with torch.no_grad():
                variable.copy_(torch.stack([simplex(row) for row in variable]))
        losses.append(loss.item())
        variables.append(variable.detach().clone().numpy())
        taken.append(nearest.numpy())
    return np.array(losses), np.stack(variables), np.stack(taken)
