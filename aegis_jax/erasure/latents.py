"""Where z_t comes from: a fresh partial trajectory of guided DDIM each step, or a pool of whole ones.

The grid is ESD's: `steps` DDIM steps at tau_i = 1 + stride (steps - 1 - i), e.g. 981, 961, ..., 1. A latent that has
come to tau is trained at t drawn from the stride-wide interval tau - 1 .. tau + stride - 2. The released sampler
(`offset`) leaves the first grid step out and starts at 961: its latents lie 39 to 58 timesteps below the t that they
are trained at, 19 to 38 at the last grid position. Other methods have other levels of t (`LEVELS`).

`frozen` is whatever an erasure never changes; used of it are unet_graph, schedule, empty_emb, latent_shape, placement.
Shapes: B latents, G rows of conditioning dealt to them in turn, h w latent size, C channels.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.diffusion import predict
from aegis_jax.diffusion.conditioning import Conditioning, join, per_latent
from aegis_jax.diffusion.sample import sample_latents
from aegis_jax.diffusion.schedule import guide, output_step
from aegis_jax.erasure.programs import program

GUIDANCE = 3.0  # classifier-free guidance of every trajectory: ESD's, and the released code's
TRAJECTORIES = 8  # of a concept in the pool
# Which t a latent that has come to tau is trained at. interval: drawn from its stride-wide interval (ESD); grid: tau
# itself (ESD's code of 2025); above: tau + stride - 1, and neither end of the grid is taken (STEREO).
LEVELS = ("interval", "grid", "above")
MOST_CONCEPTS = 64  # in a pool, some 26 MB each at 64x64 latents; with more every draw is fresh


@partial(jax.tree_util.register_dataclass, data_fields=["z", "t"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Noised:
    """Latents z (B, h, w, C) to be trained at the timesteps t (B,), int32."""

    z: jax.Array
    t: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["z", "drawn"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Pool:
    """Whole trajectories of every concept, drawn when it has its first turn.

    Attributes:
      z: (K, steps, M, h, w, C), M trajectories of each concept; entry i is to be trained at t near tau_i.
      drawn: whether a concept's have been drawn yet, (K,) bool.
    """

    z: jax.Array
    drawn: jax.Array


def empty_pool(frozen, concepts: int, latents: int, steps: int) -> Pool:
    """A pool without trajectories yet; of a concept that has `latents` latents in the whole run no more than that."""
    # Whatever the devices are: the same draws from them, and a checkpoint that any number of devices can restore.
    trajectories = max(1, min(TRAJECTORIES, latents))
    z = jnp.zeros((concepts, steps, trajectories, *frozen.latent_shape), jnp.float32)
    return Pool(z, jnp.zeros(concepts, bool))


def _grid(frozen, steps: int):
    stride = frozen.schedule.alphas_cumprod.shape[0] // steps
    return stride, 1 + stride * jnp.arange(steps - 1, -1, -1, dtype=jnp.int32)


def timesteps(frozen, steps: int):
    """The timesteps of a whole trajectory, (steps,)."""
    return _grid(frozen, steps)[1]


def due(missing, visits, refresh_every: int):
    """Whose trajectories are to be drawn in this step, (G,): those `missing`, and those that have served long enough.

    visits: how many steps each concept of the batch has had before, (G,). A concept among G in a batch has a G-th of
    its latents, so its trajectories serve G times `refresh_every` steps.
    """
    return missing | ((visits > 0) & (visits % (refresh_every * len(visits)) == 0))


def _noise(frozen, key, n: int):
    return _placed(frozen, jax.random.normal(key, (n, *frozen.latent_shape), jnp.float32))


def _placed(frozen, z):
    return z if frozen.placement is None else frozen.placement.batch(z)


def noised(frozen, key, z, i, steps: int, levels: str = "interval") -> Noised:
    """Latents of grid position i (a scalar or (B,)) with their training timesteps."""
    stride, _ = _grid(frozen, steps)
    if levels == "interval":
        above = jax.random.randint(key, (z.shape[0],), 0, stride, jnp.int32)
    else:
        above = jnp.full(z.shape[0], {"grid": 1, "above": stride}[levels], jnp.int32)
    return Noised(_placed(frozen, z), stride * (steps - 1 - i) + above)


def positions(key, shape: tuple, steps: int, levels: str):
    ends = int(levels == "above")
    return jax.random.randint(key, shape, ends, steps - ends, jnp.int32)


@program(static_argnames=("batch", "steps", "offset", "levels"))
def fresh(
    frozen, theta, cond: Conditioning, key, *, batch: int, steps: int, offset: bool = False, levels: str = "interval"
):
    """The faithful draw: (`Noised`, i): some guided steps with the current theta, as many for the whole batch.

    cond: G rows, latent n is guided by row n mod G. The grid position i is drawn evenly; the loop runs exactly the
    steps that lead there.
    """
    key_i, key_z, key_t = jax.random.split(key, 3)
    i = positions(key_i, (), steps, levels)
    z = partial_trajectory(frozen, theta, cond, _noise(frozen, key_z, batch), i, steps=steps, offset=offset)
    return noised(frozen, key_t, z, i, steps, levels), i


@program(static_argnames=("steps", "offset"))
def partial_trajectory(frozen, theta, cond: Conditioning, z_T, i, *, steps: int, offset: bool):
    """z_T (B, h, w, C) at the grid position i, a traced scalar; with `offset` as far as the released sampler goes:
    from the grid's second step on, i + 1 steps, but at most to its end."""
    grid = timesteps(frozen, steps)
    cond, empty = (per_latent(rows, z_T.shape[0]) for rows in (cond, frozen.empty_emb))
    last = jnp.minimum(i + 2, steps) if offset else i
    span = {"first": int(offset), "last": last}
    return sample_latents(frozen.unet_graph, theta, frozen.schedule, cond, empty, z_T, grid, GUIDANCE, **span)


def trajectories(frozen, theta, cond: Conditioning, key, shape: tuple[int, int], offset: bool):
    """Every latent of guided trajectories, (steps, M, h, w, C), entry i for the grid position i; shape: (steps, M).

    cond: G rows, trajectory m is guided by row m mod G.
    """
    steps, count = shape
    stride, grid = _grid(frozen, steps)
    # Devices that do not divide the trajectories draw some of them twice.
    drawn = count if frozen.placement is None else frozen.placement.rounded(count)
    pair = join(*(per_latent(rows, drawn) for rows in (frozen.empty_emb, cond)))
    z = _noise(frozen, key, count)
    z = _placed(frozen, jnp.resize(z, (drawn, *z.shape[1:])))

    def step(z, t):
        output = predict.output(frozen.unet_graph, theta, jnp.concatenate([z, z]), t, pair)
        output = guide(*jnp.split(output, 2), GUIDANCE)
        return output_step(frozen.schedule, output, z, t, t - stride), z

    z, before = jax.lax.scan(step, z, grid[1:] if offset else grid)
    # With offset the first grid step is left out: after i + 1 of the others for position i, after all of them last.
    found = jnp.concatenate([before[1:], z[None], z[None]]) if offset else before
    return found[:, :count]


@program(static_argnames=("batch", "refresh_every", "offset", "levels"), donate_argnames="pool")
def pooled(
    frozen, theta, pool: Pool, cond: Conditioning, concepts, visits, key, *, batch: int, refresh_every: int,
    offset: bool = False, levels: str = "interval",
):  # fmt: skip
    """A draw from the pool: (`Noised`, grid positions (B,), pool): latent n from the trajectories of its concept.

    concepts: of the batch, (G,), latent n belongs to the one at n mod G; cond: what theirs are guided by, G rows;
    visits: how many steps each has had before, (G,). A concept's trajectories are drawn with the current theta at its
    first turn, and again after `refresh_every` batches' worth of its latents (`due`).
    """
    steps, count = pool.z.shape[1:3]
    groups = concepts.shape[0]
    key_new, key_i, key_m, key_t = jax.random.split(key, 4)
    keys = jax.random.split(key_new, groups)
    renewed = due(~pool.drawn[concepts], visits, refresh_every)

    def renew(n, pool):
        def draw(pool):
            row = jax.tree.map(lambda x: x[n][None], cond)
            z = trajectories(frozen, theta, row, keys[n], (steps, count), offset)
            return Pool(pool.z.at[concepts[n]].set(z), pool.drawn.at[concepts[n]].set(True))

        return jax.lax.cond(renewed[n], draw, lambda pool: pool, pool)

    pool = jax.lax.fori_loop(0, groups, renew, pool)  # a loop: the network is compiled once for all concepts
    i = positions(key_i, (batch,), steps, levels)
    m = jax.random.randint(key_m, (batch,), 0, count, jnp.int32)
    return noised(frozen, key_t, pool.z[per_latent(concepts, batch), i, m], i, steps, levels), i, pool
