"""The two things an erasure asks of a network: predicted noise, and an encoded soft prompt.

Shapes: B latents, h w latent size, L tokens, d token-embedding width, D text width, G concepts in a batch.
Wherever something is given per concept, latent i of the batch belongs to row i mod G.
"""

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.schedule import Schedule, to_epsilon
from aegis_jax.models import clip, unet
from aegis_jax.models.model import full_precision


def per_latent(rows, batch: int):
    """Rows (G, ...) of the batch's concepts, dealt to its latents: (batch, ...), entry i is row i mod G."""
    if rows.shape[0] == 1:
        return jnp.broadcast_to(rows, (batch, *rows.shape[1:]))
    return jnp.tile(rows, (-(-batch // rows.shape[0]), *[1] * (rows.ndim - 1)))[:batch]


def predict(graph, params, schedule: Schedule, z_t, t, text_emb, *, remat: bool = False):
    """Predicted noise, float32 (B, h, w, C), for z_t (B, h, w, C), t (B,), text_emb (G, L, D).

    v-predictions are converted, so that every distance is one between noises. The network computes in its
    parameters' dtype; `remat` is `unet.apply`'s.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    text_emb = per_latent(text_emb, z_t.shape[0])
    with full_precision(dtype):
        output = unet.apply(graph, params, z_t.astype(dtype), t, text_emb.astype(dtype), remat=remat)
    return to_epsilon(schedule, output.astype(jnp.float32), z_t, t)


def encode_soft(text_graph, text_params, template, soft):
    """Encodes templates (G or 1, L, d) whose positions 1..n are the soft tokens (G, n, d) -> (G, L, D).

    The soft tokens enter before position embeddings and the encoder, as the tokens of a real prompt do.
    """
    template = jnp.broadcast_to(template, (soft.shape[0], *template.shape[1:]))
    return clip.encode(text_graph, text_params, template.at[:, 1 : 1 + soft.shape[1]].set(soft))


def mean_square(x):
    """Mean of the squares over batch and elements: the norm in which all losses are stated."""
    return jnp.mean(jnp.square(x))
