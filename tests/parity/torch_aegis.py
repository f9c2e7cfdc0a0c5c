"""Steps 2 to 5 of the method in float64 PyTorch, written from the method's page (docs/method.md, 2 to 5, 7) alone.

This is the reference that `aegis_jax.erasure.step.explicit_step` is held against. It shares no code with it: the
networks are diffusers' and transformers' own, loaded from the folders, and the text encoder's attention is spelled out
here because transformers' eager attention takes its softmax in float32.

Shapes: B batch, h w latent, L prompt positions, d token embedding width, D encoder width (D = d in CLIP),
m' and k numbers of soft tokens. Squared norms are means over batch and elements. Tensors of the UNet keep PyTorch's
layout and are named by diffusers' keys.
"""

import dataclasses
import os

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer


@dataclasses.dataclass(frozen=True)
class TorchPipeline:
    """What the step needs of a diffusers folder, in float64."""

    unet: torch.nn.Module
    text_encoder: torch.nn.Module
    tokenizer: CLIPTokenizer
    alphas_cumprod: torch.Tensor  # (T,)
    prediction_type: str


def load(folder) -> TorchPipeline:
    """Reads a diffusers folder; every weight is widened to float64."""
    folder = os.fspath(folder)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    return TorchPipeline(
        unet=unet.double().eval(),
        text_encoder=text_encoder.double().eval().requires_grad_(False),
        tokenizer=tokenizer,
        alphas_cumprod=scheduler.alphas_cumprod.double(),
        prediction_type=scheduler.config.prediction_type,
    )


# --- text -----------------------------------------------------------------------------------------


def _self_attention(attention, hidden):
    """Causal multi-head self-attention of a transformers CLIPAttention, softmax in float64. (B, L, d) -> (B, L, d)"""
    batch, length, _ = hidden.shape

    def heads(projected):
        return projected.view(batch, length, attention.num_heads, attention.head_dim).transpose(1, 2)

    query = heads(attention.q_proj(hidden))
    key = heads(attention.k_proj(hidden))
    value = heads(attention.v_proj(hidden))
    logits = query @ key.transpose(-1, -2) / attention.head_dim**0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(later, float("-inf")).softmax(-1)
    return attention.out_proj((weights @ value).transpose(1, 2).reshape(batch, length, -1))


def encode(text_encoder, token_embeddings):
    """E: token embeddings before positions (B, L, d) -> last hidden state after the final norm (B, L, D)."""
    body = getattr(text_encoder, "text_model", text_encoder)
    positions = body.embeddings.position_embedding.weight[: token_embeddings.shape[1]]
    hidden = token_embeddings + positions
    for layer in body.encoder.layers:
        hidden = hidden + _self_attention(layer.self_attn, layer.layer_norm1(hidden))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return body.final_layer_norm(hidden)


def embed(text_encoder, ids):
    """Rows of the token embedding table: ids (n,) -> (n, d)."""
    body = getattr(text_encoder, "text_model", text_encoder)
    return body.embeddings.token_embedding.weight[torch.as_tensor(ids, dtype=torch.long)]


def word_ids(tokenizer, text):
    """The ids of a text alone: no BOS, EOS or padding."""
    return tokenizer(text, add_special_tokens=False).input_ids


def prompt_embedding(pipeline, soft, words):
    """E([BOS, soft, words, EOS, PAD...]): soft (n, d) or None, words a list of ids -> (1, L, D)."""
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    if soft is None:
        soft = embed(text_encoder, [])
    padding = tokenizer.model_max_length - 2 - len(soft) - len(words)
    assert padding >= 0, "the prompt does not fit"
    tail = [*words, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
    tokens = torch.cat([embed(text_encoder, [tokenizer.bos_token_id]), soft, embed(text_encoder, tail)])
    return encode(text_encoder, tokens[None])


# --- noise ----------------------------------------------------------------------------------------


def predict_noise(pipeline, z_t, t, text):
    """eps(theta, z_t, t, c): z_t (B, h, w, 4), t (B,), text (1, L, D) -> (B, h, w, 4). v-prediction is converted."""
    output = pipeline.unet(z_t.permute(0, 3, 1, 2), t, text.expand(z_t.shape[0], -1, -1)).sample.permute(0, 2, 3, 1)
    if pipeline.prediction_type == "epsilon":
        return output
    assert pipeline.prediction_type == "v_prediction", pipeline.prediction_type
    alpha = pipeline.alphas_cumprod[t].view(-1, 1, 1, 1)
    return alpha.sqrt() * output + (1 - alpha).sqrt() * z_t


def _float64(x):
    """A float64 copy of a numpy, JAX or PyTorch array."""
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def mse(difference):
    """The squared norm of the method's page: a mean over batch and elements."""
    return difference.square().mean()


# --- the step -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What one step is given, apart from its soft tokens and numbers."""

    original: TorchPipeline  # theta0
    current: TorchPipeline  # theta
    words: list  # the concept's token ids
    attack: tuple  # (z_a (B, h, w, 4), t_a (B,)): where v and p take their sign steps
    loss: tuple  # (z_b, t_b): where L_e is taken


def prepare(original, current, concept, attack, loss) -> Inputs:
    """Inputs in float64 from arrays of any kind and the concept's text."""

    def pair(latent):
        z, t = latent
        return _float64(z), torch.tensor(np.asarray(t), dtype=torch.long)

    return Inputs(original, current, word_ids(original.tokenizer, concept), pair(attack), pair(loss))


def prefixed(inputs, soft):
    """c'(v) and c*(p): E([BOS, soft, concept, EOS...]) -> (1, L, D). Without soft tokens it is c_e."""
    return prompt_embedding(inputs.original, soft, inputs.words)


def adversarial_loss(inputs, p):
    """A(p), step 2."""
    with torch.no_grad():
        wanted = predict_noise(inputs.original, *inputs.attack, prefixed(inputs, None))
    return mse(predict_noise(inputs.current, *inputs.attack, prefixed(inputs, p)) - wanted)


def aet_loss(inputs, v):
    """J(v), step 3: the frozen network's prediction for c', drawn to what both networks predict for the concept."""
    with torch.no_grad():
        c_e = prefixed(inputs, None)
        eps0_concept = predict_noise(inputs.original, *inputs.attack, c_e)
        eps_concept = predict_noise(inputs.current, *inputs.attack, c_e)
    eps0_aet = predict_noise(inputs.original, *inputs.attack, prefixed(inputs, v))
    return mse(eps0_aet - eps0_concept) + mse(eps0_aet - eps_concept)


def erasure_loss(inputs, v, p, eta):
    """L_e, step 4. v None is c' := c_e, p None is c* := c_e: the ablations of section 7."""
    with torch.no_grad():
        eps0_empty = predict_noise(inputs.original, *inputs.loss, prompt_embedding(inputs.original, None, []))
        eps0_aet = predict_noise(inputs.original, *inputs.loss, prefixed(inputs, v))
        target = eps0_empty - eta * (eps0_aet - eps0_empty)
    return mse(predict_noise(inputs.current, *inputs.loss, prefixed(inputs, p)) - target)


def sign_step(loss_of, soft, size):
    """soft - size * sign(grad). Returns (loss before the step, gradient, soft after the step)."""
    soft = _float64(soft).requires_grad_(True)
    loss = loss_of(soft)
    (grad,) = torch.autograd.grad(loss, soft)
    return loss.item(), grad, soft.detach() - size * grad.sign()


def erasure_gradients(inputs, v, p, eta):
    """(L_e, {key: g_e}) at given soft tokens."""
    v, p = (x if x is None else _float64(x) for x in (v, p))
    theta = dict(inputs.current.unet.named_parameters())
    loss = erasure_loss(inputs, v, p, eta)
    return loss.item(), dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def drift(inputs):
    """{key: theta - theta0}: g_r."""
    theta0 = dict(inputs.original.unet.named_parameters())
    return {key: (theta - theta0[key]).detach() for key, theta in inputs.current.unet.named_parameters()}


# --- DGR, step 5, for one tensor ------------------------------------------------------------------


def project(g_e, g_r):
    """(P, a = <g_e, g_r>, cosine); P and cosine are 0 where there is nothing to divide by."""
    inner, size_e, size_r = (g_e * g_r).sum().item(), g_e.norm().item(), g_r.norm().item()
    projection = inner / size_r**2 * g_r if size_r > 0 else torch.zeros_like(g_r)
    return projection, inner, inner / (size_e * size_r) if size_e > 0 and size_r > 0 else 0.0


def move_omega(omega, g_e, before, mu, cap):
    """omega after its move; `before` is P of the step before."""
    sign = float((g_e * before).sum().sign())
    return min(max(omega - mu * sign, 0.0), cap)


def rectify(g_e, projection, inner, omega):
    """g; `omega` has been moved."""
    return g_e - omega * projection if inner < 0 else g_e


def dgr(grads, drift, omega, before, mu, cap):
    """Step 5 over all tensors: omega a number or {key: number}, before None (0) or {key: P_before}."""
    found = {"projection": {}, "omega": {}, "rectified": {}, "cosines": {}}
    for key, g_e in grads.items():
        projection, inner, found["cosines"][key] = project(g_e, drift[key])
        start = omega[key] if isinstance(omega, dict) else omega
        previous = torch.zeros_like(g_e) if before is None else _float64(before[key])
        found["projection"][key] = projection
        found["omega"][key] = move_omega(float(start), g_e, previous, mu, cap)
        found["rectified"][key] = rectify(g_e, projection, inner, found["omega"][key])
    return found


def explicit_step(
    original, current, concept, *, attack, loss, v, p, omega, before=None, eta, beta, gamma, mu, cap
) -> dict:
    """Steps 2 to 5 once, with this transcription's own v and p throughout; also the gradients behind the sign steps."""
    inputs = prepare(original, current, concept, attack, loss)
    loss_adv, grad_p, p = sign_step(lambda p: adversarial_loss(inputs, p), p, gamma)
    loss_aet, grad_v, v = sign_step(lambda v: aet_loss(inputs, v), v, beta)
    loss_e, grads = erasure_gradients(inputs, v, p, eta)
    return {
        "v": v,
        "p": p,
        "grad_v": grad_v,
        "grad_p": grad_p,
        "L_aet": loss_aet,
        "L_adv": loss_adv,
        "L_e": loss_e,
        "grads": grads,
        **dgr(grads, drift(inputs), omega, before, mu, cap),
    }
