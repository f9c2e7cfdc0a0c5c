"""JAX settings that a user may have in the environment: the step says the same under them."""

import dataclasses

import jax
import numpy as np
import pytest

from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.erasure.aegis.step import erase_step
from aegis_jax.erasure.presets import preset

# Between them every part of a step: two fresh latents; words, push, pools and a kept prefix; trajectories in context.
METHODS = {"paper": 1, "aegis+-two-latents": 2, "aegis+shown": 2}  # name: latents.refresh_every


def run(pipeline, name):
    """(metrics of three steps, types of state and metrics after them); kappa moves in the third."""
    own = preset(name).settings
    latents = dataclasses.replace(own.latents, steps=3, refresh_every=METHODS[name])
    config = dataclasses.replace(own, steps=3, batch=2, trainable="kv", learning_rate=1e-3, latents=latents)
    state, frozen = setup(pipeline, ["star", "red heart"], config)
    metrics = []
    for _ in range(config.steps):
        state, measured = erase_step(state, frozen, config)
        metrics.append(measured)
    types = jax.tree.map(lambda x: x.dtype.name, (state, measured))
    return jax.device_get(metrics), types


@pytest.mark.parametrize("name", [pytest.param("paper", marks=pytest.mark.slow), "aegis+-two-latents", "aegis+shown"])
def test_a_step_says_the_same_with_64_bits_and_strict_promotion(pipeline, name):
    """Both at once: no number becomes wider, no draw another, and no types are mixed.

    To 1e-4 where the number itself is less than a tenth: a tensor's cosine is a small sum of large parts.
    """
    wanted, wanted_types = run(pipeline, name)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        metrics, types = run(pipeline, name)
    assert types == wanted_types
    for ours, theirs in zip(metrics, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            least = 1e-4 if key == "per_tensor" else 1e-8
            close = lambda a, b, key=key, least=least: np.testing.assert_allclose(a, b, 1e-3, least, err_msg=key)  # noqa: E731
            jax.tree.map(close, ours[key], theirs[key])
