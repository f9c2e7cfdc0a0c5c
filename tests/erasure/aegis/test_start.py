"""A run that starts from a closed form's solution: what its first state holds, and that theta0 stays the original."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import aegis_jax
from aegis_jax.erasure import groups, lanes, trainable
from aegis_jax.erasure.aegis.config import EraseConfig
from aegis_jax.erasure.aegis.setup import setup, setup_each
from aegis_jax.erasure.presets import preset
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.model import flatten
from aegis_jax.parallel.mesh import Placement
from tests.tiny import FEWEST


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny(**FEWEST))


def settings(**changes):
    of = preset("aegis+near-speed").settings
    latents = dataclasses.replace(of.latents, steps=2)
    return dataclasses.replace(of, **{"steps": 2, "trainable": "xattn", "latents": latents} | changes)


def started(pipeline, state, config) -> dict:
    return groups.unstack(state.drift, like=trainable.select(pipeline.unet.params, config.trainable))


def change(pipeline, concepts) -> dict:
    """What SPEED alone changes: {path: array} of its erased pipeline less the original."""
    erased = aegis_jax.erase(pipeline, concepts, config={"method": "speed"}).pipeline
    before = flatten(pipeline.unet.params)
    return {path: np.asarray(x) - np.asarray(before[path]) for path, x in flatten(erased.unet.params).items()}


@pytest.mark.parametrize("part", ["xattn", "full"])
def test_the_first_drift_is_the_closed_forms_change(pipeline, part):
    config = settings(trainable=part)
    state, frozen = setup(pipeline, ["star", "red"], config)
    wanted, moved = change(pipeline, ["star", "red"]), 0
    for path, drift in started(pipeline, state, config).items():
        np.testing.assert_allclose(drift, wanted[path], atol=1e-6)
        moved += bool(np.asarray(drift).any())
    assert moved == sum(path.endswith(".attn2.to_v.kernel") for path in wanted) > 0
    # What the steps compare with is the original.
    for path, x in flatten(frozen.unet).items():
        np.testing.assert_array_equal(x, flatten(pipeline.unet.params)[path])
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((state.opt_state.mu, state.opt_state.nu)))


def test_lanes_start_each_from_its_own(pipeline):
    config = settings()
    runs = setup_each(pipeline, ["star", "red"], config)
    state, _, _ = lanes.stack(runs)
    for k, concept in enumerate(("star", "red")):
        wanted = started(pipeline, setup(pipeline, concept, config)[0], config)
        found = started(pipeline, lanes.lane(state, k), config)
        assert all(np.array_equal(found[path], wanted[path]) for path in wanted)
    assert any(not np.array_equal(*pair) for pair in zip(*(jax.tree.leaves(run[0].drift) for run in runs)))


def test_what_cannot_start_so_is_refused_before_anything_is_prepared(pipeline):
    with pytest.raises(AegisError, match="trainable='noxattn' .want full | xattn | kv"):
        preset("aegis+near-speed").method.check(settings(trainable="noxattn"))
    with pytest.raises(AegisError, match="method=aegis.near-speed starts on the host: leave mesh.data and mesh.fsdp"):
        setup(
            pipeline, "star", settings(), Placement(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")))
        )


def test_the_preset_is_what_starts_so():
    assert EraseConfig(method="aegis+near-speed").start == "speed"
    assert dataclasses.replace(settings(), method="aegis+near").start == ""


def test_shapes_are_known_without_the_weights(pipeline):
    models = {name: getattr(pipeline, name) for name in ("unet", "text_encoder")}

    def first(params):
        traced = {name: dataclasses.replace(model, params=params[name]) for name, model in models.items()}
        return setup(dataclasses.replace(pipeline, **traced), "star", settings())[0].drift

    shapes = jax.eval_shape(first, {name: model.params for name, model in models.items()})
    drift = setup(pipeline, "star", settings())[0].drift
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, drift)


def test_a_run_ends_beyond_its_start(pipeline):
    config = settings()
    result = aegis_jax.erase(pipeline, ["star", "red"], config=config)
    assert result.metrics[-1]["drift_norm"] > 0 and len(result.metrics) == config.steps
    before, after = flatten(pipeline.unet.params), flatten(result.pipeline.unet.params)
    wanted = change(pipeline, ["star", "red"])
    for path, x in after.items():
        if path.endswith(".attn2.to_v.kernel"):
            left = np.abs(np.asarray(x) - np.asarray(before[path]) - wanted[path]).max()
            assert 0 < left < 3 * config.steps * config.learning_rate
