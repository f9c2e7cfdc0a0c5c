"""Lanes dealt over 8 virtual CPU devices. Run by test_lanes.py."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import aegis_jax
from aegis_jax.erasure import lanes
from aegis_jax.erasure.aegis.setup import setup_each
from aegis_jax.erasure.aegis.step import erase_step
from aegis_jax.erasure.presets import preset
from aegis_jax.parallel.mesh import lanes_mesh
from tests.tiny import FEWEST, responsive

COLOURS, THINGS = "red green blue plain".split(), "star heart dog cat".split()
CONCEPTS = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"


@dataclasses.dataclass(frozen=True)
class Outcome:
    step: object
    frozen: object
    state: object
    metrics: list


def two_steps(pipeline, config, mesh) -> Outcome:
    runs = lanes.spread(setup_each(pipeline, CONCEPTS, config), mesh)
    state, frozen, own = lanes.stack(runs, mesh)
    step = lanes.compiled_step(functools.partial(erase_step, config=config), state, frozen, own, mesh)
    metrics = []
    for _ in range(2):
        with jax.transfer_guard_host_to_device("disallow"):
            state, measured = step(state, frozen)
        metrics.append(jax.device_get(measured))
    return Outcome(step, frozen, state, metrics)


@pytest.fixture(scope="module", params=["esd", pytest.param("aegis+", marks=pytest.mark.slow)])
def outcomes(request, tiny):
    pipeline = responsive(aegis_jax.load_pipeline(tiny(**FEWEST)))
    chosen = preset(request.param).settings
    latents = dataclasses.replace(chosen.latents, steps=4, refresh_every=2)
    config = dataclasses.replace(chosen, trainable="xattn", learning_rate=1e-3, steps=2, latents=latents)
    assert len(jax.devices()) == 8 and lanes_mesh().size == 8 and lanes_mesh(jax.devices()[:1]) is None
    return two_steps(pipeline, config, None), two_steps(pipeline, config, lanes_mesh())


def test_lanes_say_nothing_to_each_other(outcomes):
    _, many = outcomes
    for call in many.step.calls:
        assert not re.search(rf"= \S+ ({COLLECTIVES})", call.program.as_text()), call.name


def test_each_device_does_its_share(outcomes):
    """An eighth of the arithmetic of every program with a network in it, and of the state."""
    one, many = outcomes
    assert [call.name for call in one.step.calls] == [call.name for call in many.step.calls]
    shares = {}
    for ours, whole in zip(many.step.calls, one.step.calls):
        if ours.name in ("_update", "predicted"):
            shares[ours.name] = ours.program.cost_analysis()["flops"] / whole.program.cost_analysis()["flops"]
    assert shares and all(abs(share - 1 / 8) < 0.005 for share in shares.values()), shares
    for name, leaf in many.state.drift.items():
        assert leaf.sharding.spec == PartitionSpec("concept"), name
        assert leaf.addressable_shards[0].data.shape[0] == len(CONCEPTS) // 8
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(many.frozen.unet))


def test_they_are_the_lanes_of_one_device(outcomes):
    one, many = outcomes
    for ours, theirs in zip(many.metrics, one.metrics):
        np.testing.assert_allclose(ours["L_e"], theirs["L_e"], 1e-5)
        np.testing.assert_array_equal(ours["t"], theirs["t"])
    for name, mean in one.state.opt_state.mu.items():
        error = np.linalg.norm(np.asarray(many.state.opt_state.mu[name]) - np.asarray(mean))
        assert error <= 1e-3 * np.linalg.norm(mean) + 1e-9, name
