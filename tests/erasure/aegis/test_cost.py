"""The number of UNet evaluations: by hand, and against the evaluations that a run really makes."""

import dataclasses

import jax
import numpy as np
import pytest

from aegis_jax.erasure import latents
from aegis_jax.erasure.aegis import cost
from aegis_jax.erasure.aegis.config import EraseConfig, LatentsConfig, SoftConfig, WordsConfig
from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.erasure.aegis.step import erase_step
from aegis_jax.erasure.presets import preset
from aegis_jax.models import unet

FORWARD, TO_TEXT, TO_ALL = 1, 1.08, 2.0  # of a forward: itself, a backward pass to the text, one to the weights


def test_the_published_step():
    """116 forwards a step by the method's page: two trajectories of 51, five without gradient, about nine with.

    Ours are three fewer: the forward whose result is never used is left out, and the two sign steps' gradients go back
    to the text embedding only, at 1.08 forwards instead of the 2 that the page counts.
    """
    found = cost.unet_evaluations(preset("released").settings)
    steps = np.mean([min(i + 1, 49) for i in range(50)])  # of a trajectory at grid position i
    assert found.latents == pytest.approx(2 * 2 * steps) and round(found.latents) == 2 * 51
    without = 2 + 2  # at z_a eps0(c_e) and eps(c_e); at z_b eps0(c') and eps0(c_0)
    with_gradient = 2 * (FORWARD + TO_TEXT) + (FORWARD + TO_ALL)
    assert found.soft + found.erasure == pytest.approx(without + with_gradient)
    assert found.total == pytest.approx(113.08)
    unused, to_all = 1, 2 * (TO_ALL - TO_TEXT)
    assert round(found.total + unused + to_all) == 116


def test_the_papers_step_and_its_parts():
    paper = cost.unet_evaluations(preset("paper").settings)
    assert paper.latents == 2 * 2 * 24.5 and paper.words == 0  # matched levels: 0 to 49 steps
    for name, draws, soft in (
        ("esd", 1, 0), ("random-prefixes", 1, 0), ("paper-no-aet", 2, 1 + 2.08), ("paper-no-prompt", 2, 2 + 2.08),
        ("aegis+-two-latents", 2, 2 + 2 * 2.08), ("aegis+", 1, 2 + 2 * 2.08),
    ):  # fmt: skip
        found = cost.unet_evaluations(preset(name).settings)
        assert found.latents == draws * 49, name
        assert found.soft == pytest.approx(soft), name
    # Random words: theta0 for them and with the concept among them; theta for them, and back.
    assert cost.unet_evaluations(preset("aegis+").settings).words == 2 + 3
    assert cost.unet_evaluations(preset("aegis+-no-preservation").settings).words == 2
    assert cost.unet_evaluations(preset("aegis+-no-push").settings).words == 1 + 3
    in_batch = dataclasses.replace(preset("paper").settings, batch=4)
    assert cost.unet_evaluations(in_batch).total == pytest.approx(4 * paper.total)


def test_trajectories_in_context_are_pooled_where_others_are_fresh():
    """Eight of 50 guided steps, with 16 verdicts for two prompts, for 50 steps."""
    found, other = (cost.unet_evaluations(preset(name).settings) for name in ("aegis+shown", "aegis+"))
    assert found.latents - other.latents == pytest.approx(8 * (2 * 50 + 2 * 16) / 50)
    assert dataclasses.replace(found, latents=other.latents) == other


@pytest.mark.parametrize(
    ("refresh", "concepts", "trajectories"),
    [(50, 1, 20), (100, 1, 10), (999, 1, 2), (1000, 1, 1), (50, 2, 20), (400, 3, 3)],
)
def test_a_pool_costs_its_first_fill_and_its_refreshes(refresh, concepts, trajectories):
    settings = EraseConfig(batch=4, latents=LatentsConfig(refresh_every=refresh, shared=True))
    assert cost.unet_evaluations(settings, concepts).latents == pytest.approx(100 * 8 * trajectories / 1000)


def test_beyond_the_largest_pool_every_draw_is_fresh():
    settings = EraseConfig(steps=10_000, latents=LatentsConfig(refresh_every=50, shared=True))
    assert cost.unet_evaluations(settings, 64).latents < 49 == cost.unet_evaluations(settings, 65).latents


RUNS = {
    "two latents": EraseConfig(),
    "offset": EraseConfig(latents=LatentsConfig(offset=True)),
    "one latent": EraseConfig(latents=LatentsConfig(shared=True)),
    "esd": preset("esd").settings,
    "no sign steps": EraseConfig(soft=SoftConfig(beta=0.0, gamma=0.0)),
    "no target": EraseConfig(soft=SoftConfig(use="prompt")),
    "no prompt": EraseConfig(soft=SoftConfig(use="target")),
    "two pools": EraseConfig(latents=LatentsConfig(refresh_every=2)),
    "pool, offset": EraseConfig(latents=LatentsConfig(refresh_every=2, shared=True, offset=True)),
    "words": EraseConfig(words=WordsConfig(preserve=0.5, context="erase")),
    "push": EraseConfig(words=WordsConfig(context="push")),
    "shown": EraseConfig(words=WordsConfig(context="shown"), latents=LatentsConfig(refresh_every=2)),
}


@pytest.fixture
def evaluations(monkeypatch):
    """Rows that networks are evaluated for, counted as they run: none is computed, but each has a gradient."""
    rows = []

    def counted(graph, params, z, t, text, **options):
        count = len(z)
        jax.debug.callback(lambda: rows.append(count))
        return z + text.mean().astype(z.dtype) + sum(x.mean() for x in jax.tree.leaves(params))

    monkeypatch.setattr(unet, "apply", counted)
    jax.clear_caches()  # programs with the real network in them
    yield rows
    jax.clear_caches()


_ALWAYS = ("two latents", "pool, offset", "push", "shown")


@pytest.mark.parametrize("name", [n if n in _ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_against_the_run_itself(pipeline, monkeypatch, evaluations, name):
    """Every forward pass of a run is counted; backward passes are left out of both sides."""
    for backward in ("BACKWARD_TO_TEXT", "BACKWARD_TO_ALL"):
        monkeypatch.setattr(cost, backward, 0.0)
    own = RUNS[name]
    config = dataclasses.replace(
        own, steps=5, batch=3, trainable="kv", latents=dataclasses.replace(own.latents, steps=4)
    )
    drawn, fresh = [], latents.fresh

    def watched(*args, **kwargs):
        at, i = fresh(*args, **kwargs)
        drawn.append(min(int(i) + 1, 3) if config.latents.offset else int(i))
        return at, i

    monkeypatch.setattr(latents, "fresh", watched)
    state, frozen = setup(pipeline, ["star", "red"], config)
    for _ in range(config.steps):
        state, metrics = erase_step(state, frozen, config)
    jax.block_until_ready(metrics)
    jax.effects_barrier()
    expected = cost.unet_evaluations(config, 2)
    if drawn:  # the draws that were made, in place of their expectation
        mean = np.mean([min(i + 1, 3) if config.latents.offset else i for i in range(4)])
        assert expected.latents == pytest.approx(2 * config.batch * mean * len(drawn) / config.steps)
        expected = dataclasses.replace(expected, latents=2 * config.batch * sum(drawn) / config.steps)
    assert sum(evaluations) / config.steps == pytest.approx(expected.total)
