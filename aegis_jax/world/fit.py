"""The loop that trains every part of the world: jitted Adam steps, EMA, progress lines, exact
resume.
"""

import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file

EMA_DECAY = 0.995


def optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a short warm-up, cosine decay to zero and clipping at norm 1."""
    warmup = max(1, min(100, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def _save(path: pathlib.Path, tree, step: int) -> None:
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    partial = path.with_suffix(".partial")
    save_file(leaves, partial, metadata={"step": str(step)})
    os.replace(partial, path)


def _restore(path: pathlib.Path, tree):
    loaded = load_file(path)
    leaves = [jnp.asarray(loaded[str(i)]) for i in range(len(loaded))]
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves), int(header["__metadata__"]["step"])


def fit(
    name,
    params,
    loss,
    batch,
    *,
    steps,
    learning_rate,
    seed,
    folder,
    save_every=250,
    stop_at=None,
    log=print,
):
    """Train `params` and return their exponential moving average.

    loss(params, key, *arrays) -> (scalar, dict of scalars); batch(rng) -> tuple of numpy arrays.
    Both see randomness derived from (seed, step) only, so a run resumed from
    `folder/name.resume.safetensors` (written every `save_every` steps) gives the same bytes as one
    that was never interrupted. `stop_at` ends the run early after that many steps, leaving the
    resume file, and returns None.
    """
    resume = pathlib.Path(folder) / f"{name}.resume.safetensors"
    tx = optimiser(learning_rate, steps)
    # The average starts as a copy: the step donates its buffers, so the two may not share any.
    state, start = (params, tx.init(params), jax.tree.map(jnp.copy, params)), 0
    if resume.exists():
        state, start = _restore(resume, state)
        log(f"{name}: resumed at step {start}")

    def step_fn(state, key, step, arrays):
        params, opt_state, average = state
        (value, extra), grads = jax.value_and_grad(loss, has_aux=True)(params, key, *arrays)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(EMA_DECAY, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
        return (params, opt_state, average), {"loss": value, **extra}

    step_fn = jax.jit(step_fn, donate_argnums=0)
    key, began, last = jax.random.key(seed), None, start
    for step in range(start, steps):
        arrays = batch(np.random.default_rng((seed, step)))
        state, metrics = step_fn(state, jax.random.fold_in(key, step), jnp.float32(step), arrays)
        done = step + 1
        if began is None:  # the first step includes compilation: keep it out of the rate
            jax.block_until_ready(state)
            began, last = time.perf_counter(), done
        elif done % 50 == 0 or done == steps:
            values = {k: float(v) for k, v in metrics.items()}
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(f"{name}: loss is {values['loss']} at step {done}")
            seconds = (time.perf_counter() - began) / (done - last)
            shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
            left = (steps - done) * seconds
            rate = f"{1 / seconds:.2f} steps/s  {left / 60:.1f} min left"
            log(f"{name} {done}/{steps}  {rate}  {shown}")
        if done % save_every == 0 and done < steps:
            _save(resume, state, done)
        if done == stop_at:
            _save(resume, state, done)
            return None
    resume.unlink(missing_ok=True)
    return state[2]
