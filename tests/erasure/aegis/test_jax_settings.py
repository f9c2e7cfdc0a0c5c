"""JAX settings that a user may have: the step says the same under each."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.erasure.aegis.step import erase_step
from aegis_jax.erasure.presets import preset

SETTINGS = {
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "rank": lambda: jax.numpy_rank_promotion("raise"),
}
METHODS = {"paper": "fresh", "aegis+": "pool"}  # between them every part of the step


def run(pipeline, name):
    """(metrics of three steps, types of the state before and after); kappa moves in the third."""
    own = preset(name).settings
    latents = dataclasses.replace(own.latents, steps=3, refresh_every=1 if METHODS[name] == "fresh" else 2)
    config = dataclasses.replace(own, steps=3, batch=2, trainable="kv", learning_rate=1e-3, latents=latents)
    state, frozen = setup(pipeline, ["star", "red heart"], config)
    metrics, types = [], [jax.tree.map(lambda x: x.dtype.name, state)]
    for _ in range(config.steps):
        state, measured = erase_step(state, frozen, config)
        metrics.append(jax.device_get(measured))
    return metrics, [*types, jax.tree.map(lambda x: x.dtype.name, state)]


@pytest.fixture(scope="module")
def plain(pipeline):
    return {name: run(pipeline, name) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_says_the_same_under(pipeline, plain, setting, name):
    with contextlib.ExitStack() as stack:
        stack.enter_context(SETTINGS[setting]())
        metrics, types = run(pipeline, name)
    wanted, wanted_types = plain[name]
    assert types == wanted_types
    for ours, theirs in zip(metrics, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            jax.tree.map(
                lambda a, b, key=key: np.testing.assert_allclose(a, b, 1e-3, 1e-8, err_msg=key), ours[key], theirs[key]
            )
