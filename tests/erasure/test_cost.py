"""The number of UNet evaluations: by hand, and against the evaluations that a step really makes."""

import dataclasses

import jax
import numpy as np
import pytest

from aegis_jax.erasure import cost
from aegis_jax.erasure.config import AETConfig, EraseConfig, LatentsConfig, PreserveConfig, PromptConfig
from aegis_jax.erasure.setup import setup
from aegis_jax.erasure.step import erase_step
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models import unet
from tests.run.untrained import write


def test_the_paper_s_setting():
    found = cost.unet_evaluations(EraseConfig())
    assert (found.latents, round(found.aet, 1), round(found.prompt, 1), found.erasure) == (49, 4.1, 2.1, 5)
    assert found.words == 0
    context = EraseConfig(prompt=PromptConfig(context=True), batch=4)
    assert cost.unet_evaluations(context).words == 4
    followed = dataclasses.replace(context, prompt=PromptConfig(context=True, context_rate=0.1))
    assert cost.unet_evaluations(followed).words == 8
    plain = EraseConfig(aet=AETConfig(enabled=False), prompt=PromptConfig(enabled=False), batch=4)
    assert cost.unet_evaluations(plain).total == 4 * (49 + 5)


@pytest.mark.parametrize(
    ("refresh", "concepts", "trajectories"),
    [(0, 1, 1), (50, 1, 20), (100, 1, 10), (999, 1, 2), (1000, 1, 1), (50, 2, 20), (400, 3, 3), (0, 3, 3)],
)
def test_a_buffer_costs_its_first_fill_and_its_refreshes(refresh, concepts, trajectories):
    latents = LatentsConfig(refresh_every=refresh, trajectories=8)
    found = cost.unet_evaluations(EraseConfig(steps=1000, batch=4, latents=latents), concepts)
    assert found.latents == pytest.approx(100 * 8 * trajectories / 1000)


@pytest.mark.slow  # unjitted: not seen to finish within 100 s on a loaded machine
@pytest.mark.parametrize("refresh", [1, 2, 0])
def test_against_the_step_itself(tmp_path, monkeypatch, refresh):
    """Every forward pass of an unjitted run counted; backward passes are left out of both sides."""
    pipeline = load_pipeline(write(tmp_path / "model"))
    latents = LatentsConfig(steps=4, refresh_every=refresh, trajectories=3)
    preserve = PreserveConfig(weight=0.5)
    prompt = PromptConfig(context=True, context_rate=0.1)
    config = EraseConfig(steps=5, batch=2, trainable="kv", latents=latents, preserve=preserve, prompt=prompt)
    rows, done = [], []

    def counted(graph, params, z, t, text, **options):
        rows.append(len(z))
        return z + text.mean().astype(z.dtype)  # no network: the evaluations are what counts, and it has a gradient

    monkeypatch.setattr(unet, "apply", counted)
    monkeypatch.setattr(cost, "BACKWARD_TO_TEXT", 0.0)
    monkeypatch.setattr(cost, "BACKWARD_TO_ALL", 0.0)
    with jax.disable_jit():
        state, frozen = setup(pipeline, ["star"], config)
        for _ in range(config.steps):
            state, metrics = erase_step(state, frozen, config)
            done.append(float(metrics["s"]))
    expected = cost.unet_evaluations(config)
    if refresh == 1:  # the draws that were made, in place of their expectation
        expected = dataclasses.replace(expected, latents=2 * config.batch * np.mean(done))
    assert sum(rows) / config.steps == pytest.approx(expected.total)
