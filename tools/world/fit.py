"""The training of one part of the world: Adam steps and their moving average, in the library's own loop."""

import itertools
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.run import loop
from aegis_jax.run.checkpoint import Checkpoints

EMA_DECAY = 0.995
LOG_EVERY = 50


def optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a short warm-up, cosine decay to zero and clipping at norm 1."""
    warmup = max(1, min(100, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def fit(name, params, loss, batch, *, steps, learning_rate, seed, folder, save_every=250, log=print):
    """Train `params` and return their exponential moving average.

    loss(params, key, *arrays) -> (scalar, dict of scalars); batch(rng) -> tuple of numpy arrays. Both see randomness
    derived from (seed, step) only, so a run that goes on from a checkpoint in `folder/name.checkpoints` (one every
    `save_every` steps and when a signal asks to stop) gives the same bytes as one that was never interrupted. Raises
    `NonFiniteError` and `Interrupted` as aegis_jax.run.loop does.
    """
    tx = optimiser(learning_rate, steps)
    # The average starts as a copy: the step donates its buffers, so the two may not share any.
    state = {"params": params, "optimiser": tx.init(params), "average": jax.tree.map(jnp.copy, params)}
    update, key = jax.jit(update_fn(loss, tx), donate_argnums=0), jax.random.key(seed)
    checkpoints = pathlib.Path(folder).absolute() / f"{name}.checkpoints"
    with Checkpoints(checkpoints, {"part": name, "steps": steps, "rate": learning_rate, "seed": seed}, keep=1) as saved:
        done = saved.latest or 0
        if done:
            state = saved.restore(state)
            log(f"{name}: resumed at step {done}")
        numbers = itertools.count(done)

        def step_fn(state):
            step = next(numbers)
            arrays = batch(np.random.default_rng((seed, step)))
            return update(state, jax.random.fold_in(key, step), jnp.float32(step), arrays)

        record = _Progress(name, steps, log)
        state = loop.train(step_fn, state, done=done, steps=steps, record=record, save=saved.save, every=save_every)
    shutil.rmtree(checkpoints)
    return state["average"]


def update_fn(loss, tx):
    """(state, key, step, arrays) -> (state, metrics): one step of the optimiser and of the average."""

    def update(state, key, step, arrays):
        (value, extra), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], key, *arrays)
        updates, opt_state = tx.update(grads, state["optimiser"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(EMA_DECAY, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state["average"], params)
        return {"params": params, "optimiser": opt_state, "average": average}, {"loss": value, **extra}

    return update


class _Progress:
    """A line every `LOG_EVERY` steps; the first step, which compiles, does not count in the rate."""

    def __init__(self, name, steps, log):
        self.name, self.steps, self.log = name, steps, log
        self.last = None  # (step, when)

    def __call__(self, step: int, metrics: dict, per_tensor: dict, seconds: float) -> None:
        now = time.perf_counter()
        if self.last is None:
            self.last = step, now
        elif step % LOG_EVERY == 0 or step == self.steps:
            rate = (step - self.last[0]) / (now - self.last[1])
            left = f"{rate:.2f} steps/s  {(self.steps - step) / rate / 60:.1f} min left"
            shown = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            self.log(f"{self.name} {step}/{self.steps}  {left}  {shown}")
