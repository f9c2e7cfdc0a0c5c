"""Soft tokens: how v and p start, and the one sign step that moves either (docs/method.md, steps 2 and 3).

  p: eps(theta,  z_a, t_a, c*(p)) towards eps(theta0, c_e)                      the concept comes back
  v: eps(theta0, z_a, t_a, c'(v)) towards eps(theta0, c_e) and eps(theta, c_e)  the class's centre, old and new

One program serves both, with different weights as arguments. In a batch of G prompts each has soft tokens of its own,
which answer for its own latents only: every G-th one.
"""

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.conditioning import encode_soft, per_latent
from aegis_jax.diffusion.predict import predict
from aegis_jax.diffusion.vocabulary import random_words
from aegis_jax.erasure import in_turn
from aegis_jax.erasure.aegis.state import Frozen
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.programs import program


def drawn(frozen: Frozen, key, shape: tuple[int, int]):
    """Embeddings of random whole words, float32 (*shape, d).

    Pieces of words are left out (the released code draws any row): in a small vocabulary most were never trained.
    """
    return random_words(frozen.text_graph, frozen.text, frozen.word_ids, key, shape)


@program
def encoded(frozen: Frozen, template, soft):
    """Soft tokens (G, k, d) in their templates (G, L, d), encoded: G rows."""
    return encode_soft(frozen.text_graph, frozen.text, template, soft)


@program(static_argnames="remat")
def sign_step(frozen: Frozen, params, template, soft, at: Noised, goals, weights, size, *, remat: bool = False):
    """soft - size * sign(gradient of J), J = sum_i weights_i ||eps(params, c(soft)) - goals_i||^2, for each prompt.

    Args: params: of the UNet; soft (G, k, d); template (G, L, d); goals (I, B, h, w, C); weights (I,); size: scalar;
    remat: recompute in the backward pass, in which the latents take turns (in_turn.py).
    Returns (new soft tokens (G, k, d), the prompts' mean J at the old ones, float32 scalar).
    """
    prompts, batch = soft.shape[0], at.z.shape[0]

    def per_row(soft):
        return per_latent(encode_soft(frozen.text_graph, frozen.text, template, soft), batch)

    # What a latent counts in its prompt's mean.
    counts = [len(range(i, batch, prompts)) for i in range(prompts)]
    share = per_latent(1 / jnp.asarray(counts, jnp.float32), batch)

    def distance(cond, at, goals, share):
        eps = predict(frozen.unet_graph, params, frozen.schedule, at.z, at.t, cond, remat=remat)
        square = jnp.mean(jnp.square(eps[:, None] - goals), axis=(2, 3, 4))  # (B, I)
        return jnp.sum(share * jnp.sum(square * weights, axis=-1))

    # Soft tokens of one prompt do not reach another's latents, so the sum's gradient is each one's own.
    cond, pulled = jax.vjp(per_row, soft)
    args = cond, at, goals.swapaxes(0, 1), share
    value, gradient = in_turn.rows(jax.value_and_grad(distance), args, in_turn.at_once(batch, frozen.placement, remat))
    (gradient,) = pulled(gradient)
    return soft - size * jnp.sign(gradient), value / prompts
