"""Words as the text encoder's token embeddings: where soft tokens start."""

import math

import jax
import jax.numpy as jnp

from aegis_jax.models import clip


def embeddings(pipeline, ids) -> jax.Array:
    """Of token ids (n,): float32 (n, d), before positions."""
    text = pipeline.text_encoder
    return clip.embed(text.graph, text.params, jnp.asarray(ids)[None])[0].astype(jnp.float32)


def random_words(pipeline, key, shape: tuple[int, ...]) -> jax.Array:
    """Embeddings of random whole words of the vocabulary, float32 (*shape, d).

    Pieces of words are left out: in a small vocabulary most of them were never trained.
    """
    words = pipeline.tokenizer.word_ids
    drawn = jax.random.randint(key, (math.prod(shape),), 0, len(words))
    return embeddings(pipeline, jnp.asarray(words)[drawn]).reshape(*shape, -1)
