"""What a denoiser is told beside latent and timestep, as one pytree, and the doors by which text becomes it.

Shapes: n prompts, L tokens, d width of a token embedding, D text width, P width of a pooled embedding.
"""

import dataclasses
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.errors import AegisError
from aegis_jax.models import clip

PROMPTS_PER_CALL = 64


@partial(jax.tree_util.register_dataclass, data_fields=["embedding", "pooled", "size_ids"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Text conditioning of n latents. It has no behaviour: rows are taken and joined by `jax.tree.map`.

    Attributes:
      embedding: last hidden state of the text encoder, (n, L, D).
      pooled: pooled text embedding, (n, P), and
      size_ids: sizes and crops, (n, 6), of models that have these (SDXL); None for SD 1.x and 2.x.
    """

    embedding: jax.Array
    pooled: jax.Array | None = None
    size_ids: jax.Array | None = None


def check_loaded(pipeline) -> None:
    """Raises `AegisError` for what is no pipeline but, say, its name or the result of an erasure."""
    if not (hasattr(pipeline, "unet") or hasattr(pipeline, "text_encoder")):
        raise AegisError(f"wanted a Pipeline, as load_pipeline gives one, found a {type(pipeline).__name__}")


def encode(pipeline, prompts: str | list[str]) -> Conditioning:
    """Encodes prompts with the pipeline's own tokenizer and text encoder, padded as diffusers pads: n rows.

    Raises `AegisError` for what is no pipeline, no text or an empty list.
    """
    check_loaded(pipeline)
    prompts = prompt_list(prompts, "prompts")
    ids, encoder = pipeline.tokenizer.ids(prompts), pipeline.text_encoder
    parts = [
        encode_ids(encoder.graph, encoder.params, ids[i : i + PROMPTS_PER_CALL])
        for i in range(0, len(prompts), PROMPTS_PER_CALL)
    ]
    return join(*parts)


@partial(jax.jit, static_argnums=0)
def encode_ids(graph, params, input_ids) -> Conditioning:
    """The same from token ids (n, L)."""
    return encode_tokens(graph, params, clip.embed(graph, params, input_ids))


def encode_tokens(graph, params, tokens) -> Conditioning:
    """The same from token embeddings (n, L, d)."""
    return Conditioning(clip.encode(graph, params, tokens))


def encode_soft(graph, params, template, soft, first: int = 1) -> Conditioning:
    """The same from token embeddings: templates (G or 1, L, d) whose positions first, first + 1, ... are the soft
    tokens (G, k, d); G rows.

    The soft tokens enter before position embeddings and the encoder, as the tokens of a real prompt do.
    """
    template = jnp.broadcast_to(template, (soft.shape[0], *template.shape[1:]))
    return encode_tokens(graph, params, template.at[:, first : first + soft.shape[1]].set(soft))


def join(*conditionings: Conditioning) -> Conditioning:
    """The rows of several, one after another."""
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *conditionings)


def per_latent(rows, batch: int):
    """Rows (G, ...) of a pytree dealt to a batch of latents: (batch, ...), latent i has row i mod G."""

    def deal(x):
        if x.shape[0] == 1:
            return jnp.broadcast_to(x, (batch, *x.shape[1:]))
        return jnp.tile(x, (-(-batch // x.shape[0]), *[1] * (x.ndim - 1)))[:batch]

    return jax.tree.map(deal, rows)


def prompt_list(prompts, name: str) -> list[str]:
    """Prompts as a list; `AegisError` names what is none."""
    found = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise AegisError(f"{name} = {prompts!r}, wanted a text or a list of at least one text")
    return found
