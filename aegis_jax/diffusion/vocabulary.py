"""Words as the text encoder's token embeddings: where soft tokens start."""

from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.models import clip


def embeddings(pipeline, ids) -> jax.Array:
    """Of token ids (n,): float32 (n, d), before positions."""
    text = pipeline.text_encoder
    return clip.embed(text.graph, text.params, jnp.asarray(ids)[None])[0].astype(jnp.float32)


@partial(jax.jit, static_argnames=("graph", "shape"))
def random_words(graph, params, word_ids, key, shape: tuple[int, ...]) -> jax.Array:
    """Embeddings of words drawn evenly from the token ids `word_ids` (W,), float32 (*shape, d)."""
    ids = word_ids[jax.random.randint(key, shape, 0, len(word_ids), jnp.int32)]
    return clip.embed(graph, params, ids).astype(jnp.float32)
