"""The two things an erasure asks of a network: predicted noise, and an encoded soft prompt.

Shapes: B latents, h w latent size, L tokens, d token-embedding width, D text width.
"""

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.schedule import Schedule, to_epsilon
from aegis_jax.models import clip, unet


def predict(graph, params, schedule: Schedule, z_t, t, text_emb, *, remat: bool = False):
    """Predicted noise, float32 (B, h, w, C), for z_t (B, h, w, C), t (B,), text_emb (B or 1, L, D).

    v-predictions are converted, so that every distance is one between noises. The network computes in its
    parameters' dtype; `remat` is `unet.apply`'s.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    text_emb = jnp.broadcast_to(text_emb, (z_t.shape[0], *text_emb.shape[1:]))
    output = unet.apply(graph, params, z_t.astype(dtype), t, text_emb.astype(dtype), remat=remat)
    return to_epsilon(schedule, output.astype(jnp.float32), z_t, t)


def encode_soft(text_graph, text_params, template, soft):
    """Encodes a template (1, L, d) whose positions 1..n are the soft tokens (n, d) -> (1, L, D).

    The soft tokens enter before position embeddings and the encoder, as the tokens of a real prompt do.
    """
    return clip.encode(text_graph, text_params, template.at[0, 1 : 1 + soft.shape[0]].set(soft))


def mean_square(x):
    """Mean of the squares over batch and elements: the norm in which all losses are stated."""
    return jnp.mean(jnp.square(x))
