"""Steps 2 to 5 of the method in float64 PyTorch, written from the method's page alone.

This is the reference that `aegis_jax.erasure.step.explicit_step` is held against. It shares no code with it: the
networks are diffusers' and transformers' own, loaded from the folders, and the text encoder's attention is spelled out
here because transformers' eager attention takes its softmax in float32.

Shapes: B batch, h w latent, L prompt positions, d token embedding width, D encoder width (D = d in CLIP),
m' and k numbers of soft tokens. Squared norms are means over batch and elements.
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
    """One step's fixed inputs and the frozen predictions that steps 2 to 4 share."""

    original: TorchPipeline
    current: TorchPipeline
    words: list  # the concept's token ids
    z_t: torch.Tensor  # (B, h, w, 4)
    t: torch.Tensor  # (B,)
    eps0_concept: torch.Tensor  # eps(theta0, z_t, t, c_e)
    eps0_empty: torch.Tensor  # eps(theta0, z_t, t, c_0)
    eps_concept: torch.Tensor  # eps(theta, z_t, t, c_e)


def prepare(original, current, concept, z_t, t) -> Inputs:
    """Evaluates what depends on neither v nor p."""
    z_t, t = _float64(z_t), torch.tensor(np.asarray(t), dtype=torch.long)
    words = word_ids(original.tokenizer, concept)
    with torch.no_grad():
        c_e = prompt_embedding(original, None, words)
        c_0 = prompt_embedding(original, None, [])
        return Inputs(
            original,
            current,
            words,
            z_t,
            t,
            eps0_concept=predict_noise(original, z_t, t, c_e),
            eps0_empty=predict_noise(original, z_t, t, c_0),
            eps_concept=predict_noise(current, z_t, t, c_e),
        )


def aet_loss(inputs, v, current_weight):
    """J(v), step 2."""
    c_aet = prompt_embedding(inputs.original, v, [])
    eps = predict_noise(inputs.original, inputs.z_t, inputs.t, c_aet)
    return current_weight * mse(eps - inputs.eps_concept) + mse(eps - inputs.eps0_concept)


def adversarial_loss(inputs, p):
    """A(p), step 3."""
    c_star = prompt_embedding(inputs.current, p, inputs.words)
    return mse(predict_noise(inputs.current, inputs.z_t, inputs.t, c_star) - inputs.eps0_concept)


def erasure_loss(inputs, v, p, eta):
    """L_e, step 4. Without v, c' := c_e; without p, c* := c_e (the ablations of section 7)."""
    with torch.no_grad():
        c_aet = prompt_embedding(inputs.original, v, inputs.words if v is None else [])
        eps0_aet = predict_noise(inputs.original, inputs.z_t, inputs.t, c_aet)
        target = inputs.eps0_empty - eta * (eps0_aet - inputs.eps0_empty)
    c_star = prompt_embedding(inputs.current, p, inputs.words)
    return mse(predict_noise(inputs.current, inputs.z_t, inputs.t, c_star) - target)


def sign_step(loss_of, soft, size):
    """soft - size * sign(grad). Returns (loss before the step, gradient, soft after the step)."""
    soft = _float64(soft).requires_grad_(True)
    loss = loss_of(soft)
    (grad,) = torch.autograd.grad(loss, soft)
    return loss.item(), grad, soft.detach() - size * grad.sign()


def rectify(g_e, g_r, omega):
    """Step 5 for one tensor: (g, lambda, cosine)."""
    inner = (g_e * g_r).sum().item()
    size_e, size_r = g_e.norm().item(), g_r.norm().item()
    strength = -omega * inner / size_r**2 if inner < 0 and size_r > 0 else 0.0
    cosine = inner / (size_e * size_r) if size_e > 0 and size_r > 0 else 0.0
    return g_e + strength * g_r, strength, cosine


def erasure_gradients(inputs, v, p, eta, omega):
    """L_e with its gradients and their rectification, each keyed by the UNet's parameter names."""
    v, p = (x if x is None else _float64(x) for x in (v, p))
    theta = dict(inputs.current.unet.named_parameters())
    theta0 = dict(inputs.original.unet.named_parameters())
    loss = erasure_loss(inputs, v, p, eta)
    grads = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
    drift = {key: (theta[key] - theta0[key]).detach() for key in theta}
    rectified, lambdas, cosines = {}, {}, {}
    for key, g_e in grads.items():
        rectified[key], lambdas[key], cosines[key] = rectify(g_e, drift[key], omega)
    return {
        "L_e": loss.item(),
        "grads": grads,
        "drift": drift,
        "rectified": rectified,
        "lambdas": lambdas,
        "cosines": cosines,
    }


def explicit_step(original, current, concept, *, z_t, t, v, p, omega, eta, beta, gamma, current_weight=1.0):
    """Steps 2 to 5 once, with this transcription's own v and p throughout."""
    inputs = prepare(original, current, concept, z_t, t)
    loss_aet, grad_v, v = sign_step(lambda v: aet_loss(inputs, v, current_weight), v, beta)
    loss_adv, grad_p, p = sign_step(lambda p: adversarial_loss(inputs, p), p, gamma)
    soft = {"v": v, "p": p, "grad_v": grad_v, "grad_p": grad_p}
    return {
        **soft,
        "L_aet": loss_aet,
        "L_adv": loss_adv,
        **erasure_gradients(inputs, v, p, eta, omega),
    }
