"""The compiled part of a search for words: what is fixed in its rows, and gradient steps of all of them.

Shapes: R rows, k learnt tokens (padded), V tokens of the vocabulary, L tokens, d token width, h w C latents.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.attacks import spaces
from aegis_jax.attacks.rows import Denoiser
from aegis_jax.diffusion.conditioning import Conditioning, encode_tokens
from aegis_jax.diffusion.schedule import noised
from aegis_jax.diffusion.template import fill
from aegis_jax.models.model import Graph


@partial(jax.tree_util.register_dataclass, data_fields=["template", "slots", "z_0", "prompt", "key"], meta_fields=[])
@dataclass(frozen=True)
class Fixed:
    """What does not change in R rows.

    Attributes:
      template, slots: (R, L, d) and (R, L), the prompt around the learnt tokens.
      z_0: the target's latents (R, h, w, C).
      prompt: the original prompt as the model before erasure encodes it, R rows; None where the goal is the noise.
      key: (R,), of each row's draws alone.
    """

    template: jax.Array
    slots: jax.Array
    z_0: jax.Array
    prompt: Conditioning | None
    key: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["erased", "original", "text", "table"], meta_fields=["graph"])
@dataclass(frozen=True)
class Networks:
    """The model under attack, the one before erasure if the goal needs it, and the token embeddings (V, d)."""

    erased: Denoiser
    original: Denoiser | None
    text: dict
    table: jax.Array
    graph: Graph


def loss_and_gradient(net: Networks, fixed: Fixed, ids, t, noise, *, remat: bool = False):
    """Squared distance of each row's prediction to its goal, (R,), and its gradient at the learnt tokens (R, k, d).

    ids (R, k), t (R,), noise (R, h, w, C).
    """
    z_t = noised(net.erased.schedule, fixed.z_0, t, noise)
    target = noise if net.original is None else net.original(z_t, t, fixed.prompt)

    def total(soft):
        cond = encode_tokens(net.graph, net.text, fill(fixed.template, fixed.slots, soft))
        eps = net.erased(z_t, t, cond, remat=remat)
        per_row = jnp.mean(jnp.square(eps - target), axis=(1, 2, 3))
        return per_row.sum(), per_row

    gradient, losses = jax.grad(total, has_aux=True)(net.table[ids])
    return losses, gradient


@partial(jax.jit, static_argnames=("space", "chunk", "remat"))
def steps(net: Networks, fixed: Fixed, variable, moments, t, first, *, space, chunk: int, remat: bool):
    """Steps first .. first + chunk - 1: (variable, moments, losses (chunk, R), the words (R, k) after them)."""
    total, shape = len(net.erased.schedule.alphas_cumprod), fixed.z_0.shape[1:]

    def step(carry, i):
        variable, moments = carry
        keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, i), 3))(fixed.key)
        drawn = jax.vmap(lambda key: jax.random.randint(key, (), 0, total, jnp.int32))(keys[:, 0])
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys[:, 1])
        ids = space.tokens(variable, keys[:, 2], net.table)
        losses, gradient = loss_and_gradient(net, fixed, ids, jnp.where(t < 0, drawn, t), noise, remat=remat)
        return spaces.move(space, variable, moments, space.gradient(gradient, net.table)), losses

    carry, losses = jax.lax.scan(
        step, (variable, moments), first + jnp.arange(chunk, dtype=jnp.int32), unroll=chunk == 1
    )
    return *carry, losses, space.settled(carry[0], net.table)
