"""Where z_t comes from (method.md 3.1): a fresh partial trajectory each step, or a buffer of whole ones (section 6).

The grid is ESD's: `steps` DDIM steps at tau_s = 1 + stride (steps - 1 - s), e.g. 981, 961, ..., 1. After s guided
steps z sits at tau_s, and the training timestep is drawn from the stride-wide interval tau_s - 1 .. tau_s + stride - 2.
"""

from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.sample import sample_latents
from aegis_jax.diffusion.schedule import guide, output_step
from aegis_jax.erasure.config import LatentsConfig
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


@partial(jax.jit, static_argnames=("batch", "config"))
def fresh(frozen: Frozen, theta, concept_emb, key, *, batch: int, config: LatentsConfig):
    """The faithful draw: (z_t (B, h, w, C), t (B,), s): s guided steps with the current theta, s shared by the batch.

    concept_emb: (1, L, D). The loop runs exactly s steps.
    """
    stride, _ = _grid(frozen, config)
    key_s, key_z, key_t = jax.random.split(key, 3)
    s = jax.random.randint(key_s, (), 0, config.steps)
    z_t = partial_trajectory(frozen, theta, concept_emb, _noise(frozen, key_z, batch), s, config=config)
    return z_t, _draw_t(key_t, s, batch, stride, config), s


@partial(jax.jit, static_argnames="config")
def partial_trajectory(frozen: Frozen, theta, concept_emb, z_T, s, *, config: LatentsConfig):
    """z_T (B, h, w, C) after s guided steps with the current theta; concept_emb (1, L, D), s a traced scalar."""
    _, grid = _grid(frozen, config)
    text = jnp.broadcast_to(concept_emb, (z_T.shape[0], *concept_emb.shape[1:]))
    empty = jnp.broadcast_to(frozen.empty_emb, text.shape)
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


@partial(jax.jit, static_argnames=("batch", "config"), donate_argnames="buffer")
def buffered(frozen: Frozen, theta, buffer, concept, visit, key, *, batch: int, config: LatentsConfig):
    """A draw from the buffer, redrawn with the current theta at every `refresh_every`-th visit of its concept.

    concept: index into K; visit: how often this concept has had a step before.
    Returns (z_t (B, h, w, C), t (B,), s (B,), buffer).
    """
    stride, _ = _grid(frozen, config)
    key_new, key_s, key_m, key_t = jax.random.split(key, 4)
    mine = buffer[concept]
    if config.refresh_every:
        due = (visit > 0) & (visit % config.refresh_every == 0)
        emb = frozen.concept_emb[concept]
        mine = jax.lax.cond(due, lambda: _trajectories(frozen, theta, emb, key_new, config), lambda: mine)
        buffer = buffer.at[concept].set(mine)
    s = jax.random.randint(key_s, (batch,), 0, config.steps)
    m = jax.random.randint(key_m, (batch,), 0, config.trajectories)
    return _placed(frozen, mine[s, m]), _draw_t(key_t, s, batch, stride, config), s, buffer
