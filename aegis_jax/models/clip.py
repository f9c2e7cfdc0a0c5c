"""CLIP's text encoder (and the encoder stack that its vision tower shares), with transformers' names.

Token embedding and encoding are separate functions, because learnable soft tokens enter between them.
Shapes: B batch, L tokens, D width, N heads.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from aegis_jax import kinds
from aegis_jax.models import initial
from aegis_jax.models.attend import attend
from aegis_jax.models.layers import refuse
from aegis_jax.models.model import bind, full_precision

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_python": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


class CLIPAttention(nnx.Module):
    def __init__(self, width, heads, *, rngs):
        self.heads = heads
        self.q_proj = initial.Linear(width, width, rngs=rngs)
        self.k_proj = initial.Linear(width, width, rngs=rngs)
        self.v_proj = initial.Linear(width, width, rngs=rngs)
        self.out_proj = initial.Linear(width, width, rngs=rngs)

    def __call__(self, x_BLD, *, causal):
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # noqa: E731
        out = attend(split(self.q_proj(x_BLD)), split(self.k_proj(x_BLD)), split(self.v_proj(x_BLD)), causal=causal)
        return self.out_proj(out.reshape(x_BLD.shape))


class CLIPMLP(nnx.Module):
    def __init__(self, width, inner, act, *, rngs):
        self.act = act
        self.fc1 = initial.Linear(width, inner, rngs=rngs)
        self.fc2 = initial.Linear(inner, width, rngs=rngs)

    def __call__(self, x):
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


def layer_norm(width, eps, rngs):
    return initial.LayerNorm(width, epsilon=eps, use_fast_variance=False, rngs=rngs)


class CLIPEncoderLayer(nnx.Module):
    def __init__(self, config, *, rngs):
        width, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.layer_norm1 = layer_norm(width, eps, rngs)
        self.self_attn = CLIPAttention(width, config["num_attention_heads"], rngs=rngs)
        self.layer_norm2 = layer_norm(width, eps, rngs)
        self.mlp = CLIPMLP(width, config["intermediate_size"], config.get("hidden_act", "quick_gelu"), rngs=rngs)

    def __call__(self, x, *, causal):
        x = x + self.self_attn(self.layer_norm1(x), causal=causal)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """The stack of layers: causal for text, not causal for images."""

    def __init__(self, config, *, rngs):
        self.layers = nnx.List(CLIPEncoderLayer(config, rngs=rngs) for _ in range(config["num_hidden_layers"]))

    def __call__(self, x_BLD, *, causal):
        for layer in self.layers:
            x_BLD = layer(x_BLD, causal=causal)
        return x_BLD


class CLIPTextEmbeddings(nnx.Module):
    def __init__(self, config, *, rngs):
        width = config["hidden_size"]
        self.token_embedding = initial.Embed(config["vocab_size"], width, rngs=rngs)
        self.position_embedding = initial.Embed(config["max_position_embeddings"], width, rngs=rngs)


class CLIPTextTransformer(nnx.Module):
    def __init__(self, config, *, rngs):
        self.embeddings = CLIPTextEmbeddings(config, rngs=rngs)
        self.encoder = CLIPEncoder(config, rngs=rngs)
        self.final_layer_norm = layer_norm(config["hidden_size"], config.get("layer_norm_eps", 1e-5), rngs)


# transformers fills absent keys of a CLIPTextModel's config.json with these.
_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_KINDS = dict.fromkeys(_TEXT_DEFAULTS, kinds.SIZE) | {
    "num_hidden_layers": kinds.LAYERS,
    "hidden_act": kinds.NAME,
    "layer_norm_eps": kinds.POSITIVE,
}


def checked(config: dict) -> dict:
    """A text config with its defaults. Raises `AegisError` for an unsupported option.

    `architectures` may say anything, as in transformers: a whole CLIP or one with a projection has the same text tower,
    and of another model tensors are missing.
    """
    config = _TEXT_DEFAULTS | config
    problems = kinds.problems(config, _KINDS)
    refuse(problems, "text encoder")
    if config["hidden_act"] not in ACTIVATIONS:
        problems.append(f"hidden_act={config['hidden_act']!r} (supported: {', '.join(ACTIVATIONS)})")
    if config["hidden_size"] % config["num_attention_heads"]:
        heads = config["num_attention_heads"]
        problems.append(f"hidden_size={config['hidden_size']} is not divisible by num_attention_heads={heads}")
    if config.get("model_type") == "clip" and "text_config" in config:  # of both towers
        problems.append("model_type='clip' with a text_config of its own (supported: clip_text_model)")
    if config.get("use_attention_mask"):
        problems.append("use_attention_mask=True (supported: False, padding attended to as in SD 1.x and 2.x)")
    refuse(problems, "text encoder")
    return config


class CLIPTextModel(nnx.Module):
    """The text encoder of SD 1.x and 2.x, driven by its transformers config.json; `checked` says what is refused."""

    def __init__(self, config, *, rngs):
        self.text_model = CLIPTextTransformer(checked(config), rngs=rngs)


def embed(graph, params, input_ids):
    """Token embeddings, before positions: ids (B, L) -> (B, L, D)."""
    return bind(graph, params).text_model.embeddings.token_embedding(input_ids)


def encode(graph, params, token_embeddings):
    """Token embeddings (B, L, D) -> last hidden state after the final LayerNorm (B, L, D).

    L may be anything up to the position table's length. The mask is causal only: like diffusers, padding is attended
    to as if it were text.
    """
    model = bind(graph, params).text_model
    positions = model.embeddings.position_embedding(jnp.arange(token_embeddings.shape[1], dtype=jnp.int32))[None]
    with full_precision(token_embeddings.dtype):
        hidden = model.encoder(token_embeddings + positions, causal=True)
    return model.final_layer_norm(hidden)
