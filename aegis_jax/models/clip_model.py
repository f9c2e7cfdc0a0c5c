"""CLIP with both towers, with transformers' names: texts and images as vectors in one space.

Shapes: B batch, L tokens or patches, D width, E width of the common space.
"""

import jax.numpy as jnp
from flax import nnx

from aegis_jax import kinds
from aegis_jax.models import clip, initial
from aegis_jax.models.layers import refuse
from aegis_jax.models.model import bind, full_precision

# transformers fills absent keys of a vision_config and of a text_config with these.
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION_KINDS = dict.fromkeys(_VISION_DEFAULTS, kinds.SIZE) | {
    "num_hidden_layers": kinds.LAYERS,
    "hidden_act": kinds.NAME,
    "layer_norm_eps": kinds.POSITIVE,
}
_EOS = 49407  # likewise of a text_config
_LARGEST = 2  # an eos_token_id of this, as files from before 2023 have it, stands for the largest id of a row


class CLIPVisionEmbeddings(nnx.Module):
    def __init__(self, config, *, rngs):
        width, patch = config["hidden_size"], config["patch_size"]
        self.class_embedding = nnx.Param(initial.ZEROS(rngs.params(), (width,)))
        self.patch_embedding = initial.Conv(
            3, width, (patch, patch), strides=patch, padding="VALID", use_bias=False, rngs=rngs
        )
        positions = (config["image_size"] // patch) ** 2 + 1
        self.position_embedding = initial.Embed(positions, width, rngs=rngs)

    def __call__(self, x_BHWC):
        patches = self.patch_embedding(x_BHWC)
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...], (len(patches), 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], axis=1) + self.position_embedding.embedding[...][None]


class CLIPVisionTransformer(nnx.Module):
    """Images (B, H, W, 3), prepared -> the state of the first position (B, D)."""

    def __init__(self, config, *, rngs):
        eps = config["layer_norm_eps"]
        self.embeddings = CLIPVisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = clip.layer_norm(config["hidden_size"], eps, rngs)  # spelt so in every file
        self.encoder = clip.CLIPEncoder(config, rngs=rngs)
        self.post_layernorm = clip.layer_norm(config["hidden_size"], eps, rngs)

    def __call__(self, x_BHWC):
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(x_BHWC)), causal=False)
        return self.post_layernorm(hidden[:, 0])


class CLIPModel(nnx.Module):
    """transformers' CLIPModel, driven by its config.json. Raises `AegisError` for an unsupported option."""

    def __init__(self, config, *, rngs):
        vision = _VISION_DEFAULTS | _tower(config, "vision_config")
        problems = kinds.problems(vision, _VISION_KINDS)
        refuse(problems, "CLIP's vision")
        if config.get("model_type", "clip") != "clip":
            problems.append(f"model_type={config['model_type']!r} (supported: 'clip')")
        if vision["hidden_act"] not in clip.ACTIVATIONS:
            problems.append(f"hidden_act={vision['hidden_act']!r} (supported: {', '.join(clip.ACTIVATIONS)})")
        if vision["hidden_size"] % vision["num_attention_heads"]:
            problems.append(f"hidden_size={vision['hidden_size']} is not divisible by num_attention_heads")
        if vision["num_channels"] != 3 or vision["image_size"] % vision["patch_size"]:
            problems.append("images of 3 channels and whole patches are supported")
        refuse(problems, "CLIP's vision")
        text = clip.checked(_tower(config, "text_config"))
        width = config.get("projection_dim", 512)
        self.text_model = clip.CLIPTextTransformer(text, rngs=rngs)
        self.vision_model = CLIPVisionTransformer(vision, rngs=rngs)
        self.text_projection = initial.Linear(text["hidden_size"], width, use_bias=False, rngs=rngs)
        self.visual_projection = initial.Linear(vision["hidden_size"], width, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(initial.ZEROS(rngs.params(), ()))


def _tower(config: dict, name: str) -> dict:
    """What a config says of one tower. Where an old file has `name`_dict beside it transformers takes that, and its
    own defaults where that is silent, whatever the other says."""
    older = config.get(f"{name}_dict")
    found = (config.get(name) or {}) if older is None else older
    if not isinstance(found, dict):
        refuse([f"{name}={found!r} (wanted: a table)"], "CLIP")
    return found


def image_size(config: dict) -> int:
    """Pixels of a side of what `image_features` takes."""
    return (_VISION_DEFAULTS | _tower(config, "vision_config"))["image_size"]


def end_of_text(config: dict) -> int:
    """The eos of `text_features`."""
    return _tower(config, "text_config").get("eos_token_id", _EOS)


def text_features(graph, params, input_ids, eos: int):
    """Token ids (B, L) -> (B, E), not of unit length; read at the first id `eos`, which each row must have."""
    model = bind(graph, params)
    with full_precision(jnp.float32):
        tokens = model.text_model.embeddings.token_embedding(input_ids)
        positions = model.text_model.embeddings.position_embedding(jnp.arange(tokens.shape[1], dtype=jnp.int32))
        hidden = model.text_model.encoder(tokens + positions[None], causal=True)
        end = jnp.argmax(input_ids if eos == _LARGEST else input_ids == eos, axis=-1)
        hidden = model.text_model.final_layer_norm(hidden[jnp.arange(len(input_ids)), end])
        return model.text_projection(hidden)


def image_features(graph, params, images):
    """Prepared images (B, H, W, 3) -> (B, E), not of unit length."""
    model = bind(graph, params)
    with full_precision(jnp.float32):
        return model.visual_projection(model.vision_model(images))
