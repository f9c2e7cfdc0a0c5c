"""Trajectories of the concept among random words, and which of them show it (words.context = "shown"). Not in the paper
(docs/method.md).

In context a concept may be gone from one prompt and left in the next, and no measure on the latents of another prompt
says from which. So the latents in context come from trajectories of their own, that the current weights draw for random
words w with the concept among them, w + c; and theta0 judges where each ended. As a diffusion classifier does, it
noises z_0 to `LEVELS` levels and compares its errors, n being the noise:

  r = sum_t (|eps0(w) - n|^2 - |eps0(w + c) - n|^2) / sum_t |eps0(w + c) - eps0(w)|^2

which is -1 on average of what theta0 draws for w, and 1 of what it draws for w + c. Where r > `LEAST` the concept
counts as shown, and the whole trajectory is pushed away from it the harder (context.py).

What a network learns from all is their mean, a push that grows with the chance that z_t comes to show the concept.

The words of a trajectory are drawn by the step in which it was, so that a state need not hold them.

Shapes: K concepts, M trajectories of each, G concepts of a batch, B latents, h w latent size, C channels, L tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from aegis_jax.diffusion import predict
from aegis_jax.diffusion.conditioning import encode_ids, join, per_latent
from aegis_jax.erasure import latents
from aegis_jax.erasure.aegis.words import random_ids
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.programs import program, pytree

# Settled on the embedded world (docs/study.md), and only there.
LEVELS = 16  # of noise, evenly from a tenth to nine tenths of all timesteps
LEAST = -0.5
_FOLDS = {"words": 100, "latents": 101}


@pytree(data="z number shown")
@dataclasses.dataclass(frozen=True)
class ContextPool:
    """Whole trajectories of every concept among random words.

    Attributes:
      z: (K, steps, M, h, w, C), as of `latents.Pool`.
      number: in which step a concept's were drawn, counted from 1, (K,) int32; 0: not yet.
      shown: 1 where theta0 finds the concept at the trajectory's end, else 0, (K, M) float32.
    """

    z: jax.Array
    number: jax.Array
    shown: jax.Array


@pytree(data="at ids shown")
@dataclasses.dataclass(frozen=True)
class Drawn:
    """A latent for every row of a batch: `at`, its words' token ids without and with the concept, ids (2 B, L), and
    whether its trajectory shows it, (B,) float32."""

    at: Noised
    ids: jax.Array
    shown: jax.Array


def empty(pool: latents.Pool) -> ContextPool:
    """A pool without trajectories yet, as large as `pool`."""
    concepts, _, count = pool.z.shape[:3]
    return ContextPool(
        jnp.zeros_like(pool.z), jnp.zeros(concepts, jnp.int32), jnp.zeros((concepts, count), jnp.float32)
    )


def words_of(vocabulary, seed, number, concept, count: int):
    """Token ids (2, M, L) of the words that a concept's trajectories of a step, counted from 1, are drawn for: without
    and with the concept."""
    key = jax.random.fold_in(_key(seed, number, "words"), concept)
    return jnp.stack(jnp.split(random_ids(vocabulary, key, concept[None], batch=count), 2))


def _key(seed, number, what: str):
    """Other keys than the step's own (step.keys_of), which are the first few folds of the same."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number - 1), _FOLDS[what])


def resemblance(frozen, z_0, ids, key):
    """r (M,) of finished latents z_0 (M, h, w, C), by theta0; ids (2, M, L) without and with the concept."""
    count = len(z_0)
    cond = join(*(encode_ids(frozen.text_graph, frozen.text, rows) for rows in ids))
    at = jnp.linspace(0.1, 0.9, LEVELS, dtype=jnp.float32) * frozen.schedule.alphas_cumprod.shape[0]

    def level(sums, given):
        t, key = given
        noise = jax.random.normal(key, z_0.shape, jnp.float32)
        signal = frozen.schedule.alphas_cumprod[t]
        z_t = jnp.sqrt(signal) * z_0 + jnp.sqrt(1 - signal) * noise
        t = jnp.full(2 * count, t)
        eps = predict.predict(frozen.unet_graph, frozen.unet, frozen.schedule, jnp.concatenate([z_t, z_t]), t, cond)
        without, joined = jnp.split(eps, 2)
        better = _squares(without - noise) - _squares(joined - noise)
        return (sums[0] + better, sums[1] + _squares(joined - without)), None

    zeros = jnp.zeros(count, jnp.float32)
    (better, apart), _ = jax.lax.scan(level, (zeros, zeros), (at.astype(jnp.int32), jax.random.split(key, LEVELS)))
    return better / apart


def _squares(x):
    return jnp.sum(jnp.square(x), (1, 2, 3))


@program(static_argnames=("batch", "refresh_every"), donate_argnames="pool")
def drawn(frozen, theta, pool: ContextPool, concepts, visits, seed, step, *, batch: int, refresh_every: int):
    """A draw from the pool: (`Drawn`, pool); concepts, visits, refresh_every as of `latents.pooled`."""
    (steps, count), groups, number = pool.z.shape[1:3], len(concepts), step + 1
    renewed = latents.due(pool.number[concepts] == 0, visits, refresh_every)
    key_new, key_i, key_m, key_t = jax.random.split(_key(seed, number, "latents"), 4)

    def renew(n, pool):
        def draw(pool):
            concept = concepts[n]
            key_z, key_r = jax.random.split(jax.random.fold_in(key_new, n))
            ids = words_of(frozen.vocabulary, seed, number, concept, count)
            cond = encode_ids(frozen.text_graph, frozen.text, ids[1])
            z = latents.trajectories(frozen, theta, cond, key_z, (steps, count), False)
            # At the last grid position all but a thousandth of the noise is gone.
            shown = (resemblance(frozen, z[-1], ids, key_r) > LEAST).astype(jnp.float32)
            return ContextPool(
                pool.z.at[concept].set(z), pool.number.at[concept].set(number), pool.shown.at[concept].set(shown)
            )

        return jax.lax.cond(renewed[n], draw, lambda pool: pool, pool)

    pool = jax.lax.fori_loop(0, groups, renew, pool)  # a loop: the network is compiled once for all concepts
    i = latents.positions(key_i, (batch,), steps, "interval")
    m = jax.random.randint(key_m, (batch,), 0, count, jnp.int32)
    place = per_latent(jnp.arange(groups, dtype=jnp.int32), batch)
    mine = concepts[place]
    at = latents.noised(frozen, key_t, pool.z[mine, i, m], i, steps)
    said = jax.vmap(lambda number, concept: words_of(frozen.vocabulary, seed, number, concept, count))
    ids = said(pool.number[concepts], concepts)[place, :, m]
    return Drawn(at, jnp.concatenate([ids[:, 0], ids[:, 1]]), pool.shown[mine, m]), pool
