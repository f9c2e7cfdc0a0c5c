"""Adam with its moments in bfloat16, against the same in float32, and a run of `erase_step` with either."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.erasure import adam
from aegis_jax.erasure.aegis.config import EraseConfig, LatentsConfig
from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.erasure.aegis.step import erase_step
from aegis_jax.run.checkpoint import Checkpoints

SHAPES = {"3x5": (2, 3, 5), "7": (1, 7)}


def draw(rng):
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def test_float32_is_optax():
    rng = np.random.default_rng(0)
    ours, theirs = adam.init(draw(rng), jnp.float32), optax.scale_by_adam().init(draw(rng))
    for _ in range(3):
        gradients = draw(rng)
        a, ours = adam.update(gradients, ours)
        b, theirs = optax.scale_by_adam().update(gradients, theirs)
        # Their power of the count is of a whole number, ours of a float.
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6), (a, ours), (b, theirs))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_drift_before_a_step_is_told_by_its_moments():
    """Against keeping it; before any step there is none to undo."""
    rng, rate = np.random.default_rng(2), np.float32(1e-2)
    drift, state = draw(rng), adam.init(draw(rng), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, adam.drift_before(drift, state, rate), drift)
    for _ in range(4):
        direction, state = adam.update(draw(rng), state)
        after = jax.tree.map(lambda d, u: d - rate * u, drift, direction)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), adam.drift_before(after, state, rate), drift
        )
        drift = after


def test_a_variance_in_bfloat16_decays():
    """From gradients of 1 down to 0.1: rounded to nearest, it would never leave 1."""
    like = {"x": jnp.zeros((1, 4096))}
    states = [adam.init(like, dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    update = jax.jit(adam.update)
    for size, steps in ((1.0, 20), (0.1, 1500)):
        for _ in range(steps):
            states = [update({"x": jnp.full((1, 4096), size)}, state)[1] for state in states]
    wanted, found = (np.asarray(state.nu["x"], np.float64) for state in states)
    assert states[1].mu["x"].dtype == states[1].nu["x"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found.mean(), wanted.mean(), rtol=0.01)
    assert 0 < np.std(found / wanted) < 0.15


def test_rounding_by_chance_goes_to_a_neighbour_and_keeps_what_fits():
    round_at = partial(adam._rounded_by_chance, dtype=jnp.bfloat16)
    x = np.float32([[1.0, 0.0, -2.5, np.inf, 3e38, 1.001, -1.001, 1e-30]])
    kept, between = slice(0, 4), slice(5, 7)
    rounded = [np.asarray(round_at(jnp.asarray(x), step=jnp.int32(i)), np.float32)[0] for i in range(200)]
    assert {abs(float(y)) for row in rounded for y in row[between]} == {1.0, 1.0078125}
    for row in rounded[:3]:
        np.testing.assert_array_equal(row[kept], x[0, kept])


def run(pipeline, config, steps):
    state, frozen = setup(pipeline, "red star", config)
    for _ in range(steps):
        state, _ = erase_step(state, frozen, config)
    return state, frozen


def test_erasure_with_bfloat16_moments_stays_near_float32_and_resumes(pipeline, tmp_path):
    config = EraseConfig(trainable="xattn", learning_rate=1e-3, latents=LatentsConfig(steps=4))
    short = dataclasses.replace(config, low_memory=True)
    wanted, _ = run(pipeline, config, 4)
    found, frozen = run(pipeline, short, 3)
    with Checkpoints(tmp_path / "checkpoints", {}, 1) as checkpoints:
        checkpoints.save(3, found)
        checkpoints.wait()
        resumed = checkpoints.restore(setup(pipeline, "red star", short)[0])
    found, _ = erase_step(found, frozen, short)
    resumed, _ = erase_step(resumed, frozen, short)
    jax.tree.map(np.testing.assert_array_equal, resumed, found)
    for dtype, state in (("float32", wanted), ("bfloat16", found)):
        assert {x.dtype.name for x in jax.tree.leaves((state.opt_state.mu, state.opt_state.nu))} == {dtype}
        assert {x.dtype.name for x in jax.tree.leaves(state.drift)} == {"float32"}
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.drift)]) for state in (wanted, found)]
    assert np.linalg.norm(flat[1] - flat[0]) < 0.02 * np.linalg.norm(flat[0])
    assert np.linalg.norm(flat[0]) > 0
