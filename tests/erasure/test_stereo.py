"""STEREO's phases: how a run's steps are divided, and what a phase begins with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.erasure.presets import preset
from aegis_jax.erasure.stereo import step
from aegis_jax.erasure.stereo.config import InversionConfig, LatentsConfig, SearchConfig, StereoConfig
from aegis_jax.erasure.stereo.setup import setup
from aegis_jax.erasure.stereo.step import ERASE, INVERT, ONCE, Phase, phase_of

SMALL = StereoConfig(
    trainable="kv", inversion=InversionConfig(initial="dog", pictures=5), latents=LatentsConfig(3, 2)
)  # fmt: skip


def test_the_published_scale():
    """The command of nudity: two rounds, 200 steps of each kind, 3000 of an inversion; 5e-6, and 2e-5 once."""
    config = preset("stereo").settings
    assert (config.search.rounds, config.steps // config.phases) == (2, 200)
    assert config.steps // config.phases * config.inversion.steps == 3000
    assert config.learning_rate * np.array([config.search.rate, config.once.rate]) == pytest.approx([5e-6, 2e-5])
    assert (config.once.anchor, config.once.negative, config.search.eta) == (1.0, 3.0, 0.0)


def test_the_steps_of_a_run_are_divided():
    config = StereoConfig(steps=12, search=SearchConfig(rounds=2))
    found = [phase_of(config, n) for n in range(12)]
    assert [p.kind for p in found] == [ERASE] * 2 + [INVERT] * 2 + [ERASE] * 2 + [INVERT] * 2 + [ONCE] * 4
    assert [p.round for p in found] == [0] * 4 + [1] * 4 + [2] * 4
    assert [p.position for p in found] == [0, 1] * 4 + [0, 1, 2, 3]


@pytest.fixture(scope="module")
def begun(pipeline):
    """(a state in which everything has moved, the frozen side)."""
    state, frozen = setup(pipeline, "star", SMALL)
    moved = jax.tree.map(lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.floating) else ~x, state)
    return dataclasses.replace(moved, step=state.step), frozen


def zero(tree):
    return not any(np.asarray(x).any() for x in jax.tree.leaves(tree))


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_what_a_phase_begins_with(begun):
    state, frozen = begun
    erase = step._begun(state, frozen, Phase(ERASE, 1, 0))
    assert same(erase.teacher, state.drift) and same(erase.drift, state.drift) and zero(erase.opt_state)
    assert same((erase.soft, erase.latents), (state.soft, state.latents))
    invert = step._begun(state, frozen, Phase(INVERT, 1, 0))
    assert same(invert.soft, np.stack([state.soft[0], frozen.initial])) and zero(invert.moments)
    assert same((invert.drift, invert.opt_state), (state.drift, state.opt_state))
    once = step._begun(state, frozen, Phase(ONCE, 2, 0))
    assert zero((once.drift, once.teacher, once.opt_state)) and same(once.soft, state.soft)
    assert state.latents["erase"].drawn.all() and not once.latents["erase"].drawn.any()


def test_pictures_and_prompts(begun):
    state, frozen = begun
    assert frozen.z_0.shape == (5, *frozen.net.latent_shape) and np.isfinite(frozen.z_0).all()
    assert np.ptp(np.asarray(frozen.z_0), axis=0).max() > 0.1  # of noise of their own
    conds = step.prompts(frozen.net, frozen.plain, frozen.template, state.soft).embedding
    assert len(conds) == 3 and len({x.tobytes() for x in np.asarray(conds[:, 2])}) == 2  # both tokens are alike here


def test_prompts_take_turns_in_shuffled_passes():
    seed = np.uint32(0)
    turns = [step._turn(seed, np.int32(i), 3, 0) for i in range(300)]
    numbers, visits = (np.concatenate([np.asarray(x[k]) for x in turns]) for k in (0, 1))
    passes = numbers.reshape(100, 3)
    assert (np.sort(passes, axis=1) == np.arange(3)).all() and len(np.unique(passes, axis=0)) == 6
    np.testing.assert_array_equal(visits, np.arange(300) // 3)
