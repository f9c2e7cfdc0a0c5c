"""The compiled part of the soft-prompt attack: rows of soft tokens, a step of all of them, their held-out losses.

Shapes: R rows, K soft tokens (padded), L tokens, d token width, B images of a call, h w C latents.
"""

import math
import threading
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.attacks.given import Given, Viewer, groups, take
from aegis_jax.diffusion.conditioning import Conditioning, encode_tokens
from aegis_jax.diffusion.predict import predict
from aegis_jax.diffusion.sample import latent_shape
from aegis_jax.diffusion.schedule import Schedule, noised
from aegis_jax.diffusion.template import fill
from aegis_jax.diffusion.threads import cores, side_by_side
from aegis_jax.models.model import Graph

# Of all latents in a call: eight latents of SD 1.4, or 32 of 8x8 on a CPU, where several calls run side by side.
PIXELS_PER_CALL = 8 * 64 * 64
PIXELS_PER_CPU_CALL = 32 * 8 * 8
STEPS_PER_CALL = 10  # on an accelerator; on a CPU one, for XLA runs a loop's convolutions slower there
_adam = optax.scale_by_adam()


def per_call(count: int, pixels: int) -> tuple[int, bool]:
    """(how many of `count` rows go into a call, whether its backward pass computes the UNet's forward pass again).

    pixels: of a row's latents. All calls are of one shape, and the last is filled up by as few repeats as can be.
    """
    most = max(1, (PIXELS_PER_CPU_CALL if jax.default_backend() == "cpu" else PIXELS_PER_CALL) // pixels)
    size = -(-count // -(-count // most))
    return size, size * pixels > PIXELS_PER_CALL // 8


def viewer_of(pipeline, given: Given, count: int) -> Viewer:
    """A viewer for `count` pictures at a time, in as few calls as hold them."""
    return Viewer(pipeline, given, per_call(count, math.prod(latent_shape(pipeline)[:2]))[0])


@partial(jax.tree_util.register_dataclass, data_fields=["params", "schedule"], meta_fields=["graph"])
@dataclass(frozen=True)
class Denoiser:
    """A UNet and what its output means."""

    params: dict
    schedule: Schedule
    graph: Graph

    def __call__(self, z_t, t, cond: Conditioning, *, remat: bool = False):
        """Predicted noise (B, h, w, C); latent i has row i mod G of the conditioning."""
        return predict(self.graph, self.params, self.schedule, z_t, t, cond, remat=remat)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["erased", "text", "original", "concept"],
    meta_fields=["text_graph"],
)
@dataclass(frozen=True)
class Networks:
    """The model under attack and, where the attacker has it, the one before erasure with the concept's prompt."""

    erased: Denoiser
    text: dict  # the text encoder's parameters
    original: Denoiser | None
    concept: Conditioning | None  # one row
    text_graph: Graph


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["soft", "template", "slots", "learning_rate", "to_prediction"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Rows:
    """Restarts of members of the family.

    Attributes:
      soft: soft tokens (R, K, d); what no slot names has no effect, no gradient, and stays as it is.
      template, slots: (R, L, d) and (R, L), the prompt around them: see prompt.py.
      learning_rate: (R,).
      to_prediction: (R,), whether the goal is the original model's prediction, otherwise the noise.
    """

    soft: jax.Array
    template: jax.Array
    slots: jax.Array
    learning_rate: jax.Array
    to_prediction: jax.Array


@dataclass(frozen=True)
class Data:
    """The attacker's latents, to train on and held out, the keys of their noise and the number of held-out draws."""

    train: jax.Array
    held_out: jax.Array
    train_key: jax.Array
    held_out_key: jax.Array
    held_out_draws: int


def draws(key, z_0, count: int, timesteps: int):
    """`count` images of z_0 (m, h, w, C) with timesteps and noise: (z_0, t, noise).

    The timesteps are spread evenly over the schedule from a random start, so that losses scatter less.
    """
    key_i, key_t, key_n = jax.random.split(key, 3)
    spread = (jax.random.uniform(key_t, (), jnp.float32) + jnp.arange(count, dtype=jnp.float32) / count) % 1
    # Images in a random order, each again only after all the others.
    rounds = jax.random.split(key_i, -(-count // len(z_0)))
    order = jax.vmap(lambda key: jax.random.permutation(key, len(z_0)))(rounds).reshape(-1)[:count]
    t = jnp.minimum((spread * timesteps).astype(jnp.int32), timesteps - 1)
    return z_0[order], t, jax.random.normal(key_n, (count, *z_0.shape[1:]), jnp.float32)


def distances(net: Networks, rows: Rows, soft, z_t, t, targets, *, remat: bool = False):
    """Mean squared distance of every row's prediction to each target, per image: (len(targets), B, R).

    targets: arrays (B, R or 1, h, w, C).
    """
    R, B = len(soft), len(z_t)
    cond = encode_tokens(net.text_graph, net.text, fill(rows.template, rows.slots, soft))
    # Rows vary fastest, as `predict` deals them.
    eps = net.erased(jnp.repeat(z_t, R, axis=0), jnp.repeat(t, R), cond, remat=remat)
    eps = eps.reshape(B, R, *z_t.shape[1:])
    return jnp.stack([jnp.mean(jnp.square(eps - target), axis=(2, 3, 4)) for target in targets])


def goal(net: Networks, rows: Rows, z_t, t, noise):
    """What each row's prediction is to come near: (B, R, h, w, C)."""
    noise = noise[:, None]
    if net.original is None:
        return noise
    before = net.original(z_t, t, net.concept)[:, None]
    return jnp.where(rows.to_prediction[:, None, None, None], before, noise)


@partial(jax.jit, static_argnames=("batch", "chunk", "remat"))
def _steps(net: Networks, rows: Rows, opt_state, z_0, key, first, steps, *, batch: int, chunk: int, remat: bool):
    """Steps first .. first + chunk - 1 of `steps`: (rows, opt_state, losses (chunk, R))."""
    schedule = net.erased.schedule

    def step(carry, i):
        soft, opt_state = carry
        z, t, noise = draws(jax.random.fold_in(key, i), z_0, batch, len(schedule.alphas_cumprod))
        z_t = noised(schedule, z, t, noise)
        target = goal(net, rows, z_t, t, noise)

        def total(soft):
            per_row = distances(net, rows, soft, z_t, t, [target], remat=remat)[0].mean(0)
            return jnp.sum(per_row), per_row

        gradient, per_row = jax.grad(total, has_aux=True)(soft)
        update, opt_state = _adam.update(gradient, opt_state)
        # Cosine decay: what is judged is the last iterate.
        decay = 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
        return (soft - (decay * rows.learning_rate)[:, None, None] * update, opt_state), per_row

    (soft, opt_state), losses = jax.lax.scan(step, (rows.soft, opt_state), first + jnp.arange(chunk, dtype=jnp.int32))
    return replace(rows, soft=soft), opt_state, losses


@jax.jit
def _held_out(net: Networks, rows: Rows, z_0, t, noise):
    """(1 or 2, B, R): distance to the noise and, where the original is known, to its prediction."""
    z_t = noised(net.erased.schedule, z_0, t, noise)
    targets = [noise[:, None]]
    if net.original is not None:
        targets.append(net.original(z_t, t, net.concept)[:, None])
    return distances(net, rows, rows.soft, z_t, t, targets)


def held_out_losses(net: Networks, rows: Rows, data: Data, batch: int) -> np.ndarray:
    """(1 or 2, R): both goals' losses on the same held-out draws for every row."""
    count = data.held_out_draws
    z, t, noise = draws(data.held_out_key, data.held_out, count, len(net.erased.schedule.alphas_cumprod))
    parts = []
    for start in range(0, count, batch):
        taken = np.minimum(np.arange(start, start + batch), count - 1)  # the last call is filled up: one shape
        parts.append(np.asarray(_held_out(net, rows, z[taken], t[taken], noise[taken])))
    return np.concatenate(parts, axis=1)[:, :count].mean(1)


class Counter:
    """Row-steps done, told to `progress(done, total, loss)` from whichever thread did them."""

    def __init__(self, progress, total: int):
        self.progress, self.total, self.done, self.lock = progress, total, 0, threading.Lock()

    def __call__(self, count: int, loss: float) -> None:
        with self.lock:
            self.done += count
            if self.progress:
                self.progress(self.done, self.total, loss)


def fit(net: Networks, rows: Rows, data: Data, *, steps: int, batch: int, counter: Counter):
    """Trains all rows, as many to a call as fit.

    (rows, losses (steps, R), held-out losses (1 or 2, R), how many calls they are packed into).
    """
    on_cpu, count = jax.default_backend() == "cpu", len(rows.soft)
    size, remat = per_call(count, batch * math.prod(data.train.shape[1:3]))
    packed = groups(np.arange(count), size)
    step = partial(
        _steps, net, z_0=data.train, key=data.train_key, steps=jnp.float32(steps), batch=batch,
        chunk=1 if on_cpu else math.gcd(steps, STEPS_PER_CALL), remat=remat,
    )  # fmt: skip

    def run(numbers):
        mine, real = take(rows, numbers), len(set(numbers.tolist()))
        opt_state, history = _adam.init(mine.soft), []
        while sum(map(len, history)) < steps:
            mine, opt_state, losses = step(mine, opt_state, first=jnp.int32(sum(map(len, history))))
            history.append(np.asarray(losses)[:, :real])
            counter(history[-1].size, float(history[-1].mean()))
        held_out = held_out_losses(net, mine, data, batch)[:, :real]
        return jax.tree.map(lambda x: x[:real], mine), np.concatenate(history), held_out

    at_once = cores() if on_cpu else 1
    if min(at_once, len(packed)) > 1:  # compiles, before several threads would each do so
        first = take(rows, packed[0])
        step(first, _adam.init(first.soft), first=jnp.int32(0))
        held_out_losses(net, first, replace(data, held_out_draws=batch), batch)
    fitted, history, held_out = zip(*side_by_side(run, packed, at_once))
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *fitted)
    return joined, np.concatenate(history, axis=1), np.concatenate(held_out, axis=1), len(packed)
