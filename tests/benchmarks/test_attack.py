"""The attack benchmark on an untrained model: batched and single restarts give the same."""

import numpy as np
import pytest

from aegis_jax.attacks.soft_prompt import SoftPromptConfig
from aegis_jax.io.pipeline import load_pipeline
from benchmarks import attack


@pytest.mark.slow
def test_same_results_batched_and_one_by_one(tiny):
    pipeline = load_pipeline(tiny())
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    config = SoftPromptConfig(tokens=2, restarts=3, steps=3, batch=2)
    found = [attack.timed(pipeline, images, config, side) for side in attack.SIDES]
    (figures, soft, losses), (_, soft_single, losses_single) = found
    assert losses.shape == (3, 3) and figures["steps_per_s"] > 0
    assert attack.difference(losses, losses_single) < 1e-4
    np.testing.assert_allclose(soft, soft_single, atol=1e-3)
    assert not np.allclose(soft[0], soft[1])  # the restarts do differ
