"""Where z_t comes from (method.md 3.1): a fresh partial trajectory each step, or a buffer of whole ones (section 6).

The grid is ESD's: `steps` DDIM steps at tau_s = 1 + stride (steps - 1 - s), e.g. 981, 961, ..., 1. After s guided
steps z sits at tau_s, and the training timestep is drawn from the stride-wide interval tau_s - 1 .. tau_s + stride - 2.
"""

from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.conditioning import Conditioning
from aegis_jax.diffusion.sample import sample_latents
from aegis_jax.diffusion.schedule import guide, output_step
from aegis_jax.erasure.config import LatentsConfig
from aegis_jax.erasure.networks import per_latent
from aegis_jax.erasure.programs import program
from aegis_jax.erasure.state import Frozen
from aegis_jax.models import unet


def _grid(frozen: Frozen, config: LatentsConfig):
    stride = frozen.schedule.alphas_cumprod.shape[0] // config.steps
    return stride, 1 + stride * jnp.arange(config.steps - 1, -1, -1, dtype=jnp.int32)


def _noise(frozen: Frozen, key, n: int):
    return _placed(frozen, jax.random.normal(key, (n, *frozen.latent_shape), jnp.float32))


def _placed(frozen: Frozen, z):
    return z if frozen.placement is None else frozen.placement.batch(z)


def _draw_t(key, s, batch: int, stride: int, config: LatentsConfig):
    """Training timesteps (B,) of latents that have done s steps; s scalar or (B,)."""
    return stride * (config.steps - 1 - s) + jax.random.randint(key, (batch,), 0, stride)


@program(static_argnames=("batch", "config"))
def fresh(frozen: Frozen, theta, concept_emb, key, *, batch: int, config: LatentsConfig):
    """The faithful draw: (z_t (B, h, w, C), t (B,), s): s guided steps with the current theta, s shared by the batch.

    concept_emb: (G, L, D), latent i is guided by row i mod G. The loop runs exactly s steps.
    """
    stride, _ = _grid(frozen, config)
    key_s, key_z, key_t = jax.random.split(key, 3)
    s = jax.random.randint(key_s, (), 0, config.steps)
    z_t = partial_trajectory(frozen, theta, concept_emb, _noise(frozen, key_z, batch), s, config=config)
    return z_t, _draw_t(key_t, s, batch, stride, config), s


@program(static_argnames="config")
def partial_trajectory(frozen: Frozen, theta, concept_emb, z_T, s, *, config: LatentsConfig):
    """z_T (B, h, w, C) after s guided steps with theta; concept_emb (G, L, D) as in `fresh`, s a traced scalar."""
    _, grid = _grid(frozen, config)
    text, empty = (Conditioning(per_latent(emb, z_T.shape[0])) for emb in (concept_emb, frozen.empty_emb))
    return sample_latents(frozen.unet_graph, theta, frozen.schedule, text, empty, z_T, grid, config.guidance, last=s)


def _trajectories(frozen: Frozen, theta, concept_emb, key, config: LatentsConfig):
    """Every latent of `config.trajectories` guided trajectories: (steps, M, h, w, C), entry s after s steps."""
    stride, grid = _grid(frozen, config)
    dtype = jax.tree.leaves(theta)[0].dtype
    pair = jnp.concatenate([frozen.empty_emb, concept_emb])
    pair = jnp.repeat(pair, config.trajectories, axis=0).astype(dtype)

    def step(z, t):
        output = unet.apply(frozen.unet_graph, theta, jnp.concatenate([z, z]).astype(dtype), t, pair)
        output = guide(*jnp.split(output.astype(jnp.float32), 2), config.guidance)
        return output_step(frozen.schedule, output, z, t, t - stride), z

    return jax.lax.scan(step, _noise(frozen, key, config.trajectories), grid)[1]


@partial(jax.jit, static_argnames="config")
def fill(frozen: Frozen, theta, key, *, config: LatentsConfig):
    """The buffer at the start, one set of trajectories per concept: (K, steps, M, h, w, C)."""
    keys = jax.random.split(key, frozen.concept_emb.shape[0])
    draw = lambda args: _trajectories(frozen, theta, *args, config)  # noqa: E731
    return jax.lax.map(draw, (frozen.concept_emb, keys))


@program(static_argnames=("batch", "config"), donate_argnames="buffer")
def buffered(frozen: Frozen, theta, buffer, concepts, visits, key, *, batch: int, config: LatentsConfig):
    """A draw from the buffer: latent i from the trajectories of its concept.

    concepts: indices into K of the batch's G concepts, (G,), latent i belongs to the one at i mod G; visits: how many
    steps each has had before, (G,).
    Returns (z_t (B, h, w, C), t (B,), s (B,), buffer).
    """
    stride, _ = _grid(frozen, config)
    key_new, key_s, key_m, key_t = jax.random.split(key, 4)
    if config.refresh_every:
        buffer = _refreshed(frozen, theta, buffer, concepts, visits, key_new, config)
    s = jax.random.randint(key_s, (batch,), 0, config.steps)
    m = jax.random.randint(key_m, (batch,), 0, config.trajectories)
    z_t = buffer[per_latent(concepts, batch), s, m]
    return _placed(frozen, z_t), _draw_t(key_t, s, batch, stride, config), s, buffer


def _refreshed(frozen: Frozen, theta, buffer, concepts, visits, key, config: LatentsConfig):
    """The buffer with the sets of those `concepts` redrawn with the current theta that are due.

    A concept among G in a batch has a G-th of its latents, so its set serves G times as many steps: as many draws and,
    over the K concepts, as many network calls a step as if it had whole batches to itself.
    """
    count = concepts.shape[0]
    due = (visits > 0) & (visits % (config.refresh_every * count) == 0)
    keys = key[None] if count == 1 else jax.random.split(key, count)

    def renew(i, buffer):
        def draw(buffer):
            emb = frozen.concept_emb[concepts[i]]
            return buffer.at[concepts[i]].set(_trajectories(frozen, theta, emb, keys[i], config))

        return jax.lax.cond(due[i], draw, lambda buffer: buffer, buffer)

    return jax.lax.fori_loop(0, count, renew, buffer)  # a loop: the network is compiled once for all concepts
