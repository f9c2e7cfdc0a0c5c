"""STEREO's three losses in float64 PyTorch, written from the paper's description (docs/method.md) alone.

The networks are diffusers' and transformers' own (torch_aegis.py). `current` is theta, `teacher` the weights that a
round of the search began with, `original` theta0. A prompt is a list of word ids, or a token that was learnt, (k, d).
"""

import torch

from tests.parity.torch_aegis import embed, encode, mse, predict_noise, prompt_embedding


def _embedding(pipeline, prompt):
    return (
        prompt_embedding(pipeline, None, prompt) if isinstance(prompt, list) else prompt_embedding(pipeline, prompt, [])
    )


def search_loss(current, teacher, prompt, at, eta):
    """Stage 1: a concept is erased, as the teacher sees it."""
    with torch.no_grad():
        empty = predict_noise(teacher, *at, _embedding(teacher, []))
        concept = predict_noise(teacher, *at, _embedding(teacher, prompt))
    return mse(predict_noise(current, *at, _embedding(current, prompt)) - (empty - eta * (concept - empty)))


def once_loss(current, original, prompts, chosen, anchor, at, weights):
    """Stage 2: under prompts[chosen] the anchor is added, and the mean of all prompts taken away."""
    a, n = weights
    with torch.no_grad():
        empty = predict_noise(original, *at, _embedding(original, []))
        goal = empty + a * (predict_noise(original, *at, _embedding(original, anchor)) - empty)
        for prompt in prompts:
            goal = goal - n / len(prompts) * (predict_noise(original, *at, _embedding(original, prompt)) - empty)
    return mse(predict_noise(current, *at, _embedding(current, prompts[chosen])) - goal)


def inversion_loss(current, texts, token, z_0, t, noise):
    """Textual inversion: picture i, with noise, under its text (ids before the token, ids behind it)."""
    tokenizer, text_encoder = current.tokenizer, current.text_encoder
    alpha = current.alphas_cumprod[t].view(-1, 1, 1, 1)
    z_t = alpha.sqrt() * z_0 + (1 - alpha).sqrt() * noise
    total = 0.0
    for i, (before, behind) in enumerate(texts):
        head, tail = [tokenizer.bos_token_id, *before], [*behind, tokenizer.eos_token_id]
        tail += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(head) - len(token) - len(tail))
        text = encode(text_encoder, torch.cat([embed(text_encoder, head), token, embed(text_encoder, tail)])[None])
        total = total + mse(predict_noise(current, z_t[i : i + 1], t[i : i + 1], text) - noise[i : i + 1])
    return total / len(texts)
