"""White coordinates for keys and values: the matrix against its definition in float64, the step against one without."""

import dataclasses

import numpy as np
import pytest

import aegis_jax
from aegis_jax.erasure import groups, trainable, whiten, words
from aegis_jax.erasure.config import AETConfig, EraseConfig, GRPConfig, PreserveConfig, PromptConfig
from aegis_jax.erasure.setup import setup
from aegis_jax.erasure.step import erase_step
from aegis_jax.world import WEIGHTS

CONFIG = EraseConfig(
    trainable="xattn",
    learning_rate=1e-3,
    aet=AETConfig(enabled=False),
    prompt=PromptConfig(enabled=False),
    grp=GRPConfig(retention="none"),
    latents=dataclasses.replace(EraseConfig.latents, steps=4),
)
WHITE = dataclasses.replace(CONFIG, preserve=PreserveConfig(whiten=0.25, empty=0.25))


def test_the_matrix_is_the_inverse_root_of_random_prompts_second_moment(monkeypatch, pipeline):
    drawn, random_prompts = [], words.random_prompts

    def watched(*args, **kwargs):
        assert kwargs["empty"] == 0.25
        drawn.append(np.asarray(random_prompts(*args, **kwargs), np.float64))
        return drawn[-1].astype(np.float32)

    monkeypatch.setattr(words, "random_prompts", watched)
    _, frozen = setup(pipeline, "star", WHITE)
    states = np.concatenate(drawn).reshape(-1, drawn[0].shape[-1])
    assert len(np.unique(states.round(4), axis=0)) > 1000  # every call its own prompts
    moment = states.T @ states / len(states)
    scaled = moment / (np.trace(moment) / len(moment)) + whiten._FLOOR * np.eye(len(moment))
    R = np.asarray(frozen.whitener, np.float64)
    np.testing.assert_allclose(R, R.T, atol=1e-5)
    np.testing.assert_allclose(R @ R @ scaled @ R @ R, np.eye(len(R)), atol=5e-3)  # the power is a quarter
    assert np.linalg.eigvalsh(R).min() > 0


def test_adam_works_in_white_coordinates(pipeline):
    """Of keys and values alone; what the step computes besides stays as it is."""
    (plain, unwhitened), (white, frozen) = (setup(pipeline, "star", config) for config in (CONFIG, WHITE))
    R = np.asarray(frozen.whitener, np.float64)
    (plain, before), (white, after) = erase_step(plain, unwhitened, CONFIG), erase_step(white, frozen, WHITE)
    np.testing.assert_allclose(before["L_e"], after["L_e"], 1e-5)
    like = trainable.select(pipeline.unet.params, "xattn")
    unstacked = lambda tree: {k: np.asarray(x, np.float64) for k, x in groups.unstack(tree, like).items()}  # noqa: E731
    g, mu = unstacked(plain.opt_state.mu), unstacked(white.opt_state.mu)
    nu, moved, usual = unstacked(white.opt_state.nu), unstacked(white.drift), unstacked(plain.drift)
    ours = [path for path in like if ".to_k." in path or ".to_v." in path]
    assert 0 < len(ours) < len(like)
    for path in like:
        if path not in ours:
            np.testing.assert_array_equal(mu[path], g[path], path)
            np.testing.assert_array_equal(moved[path], usual[path], path)
            continue
        np.testing.assert_allclose(mu[path], R @ g[path], rtol=1e-3, atol=1e-4 * np.abs(R @ g[path]).max())
        direction = (mu[path] / 0.1) / (np.sqrt(nu[path] / 0.001) + 1e-8)  # Adam's first
        wanted = -WHITE.learning_rate * R @ direction
        np.testing.assert_allclose(moved[path], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")
def test_the_world_s_text_lies_along_few_directions():
    """The figures of whiten.py and docs/study.md, 14."""
    pipeline = aegis_jax.load_pipeline("world")
    _, frozen = setup(pipeline, "star", dataclasses.replace(WHITE, preserve=PreserveConfig(whiten=0.5, empty=0.35)))
    shares = np.linalg.eigvalsh(np.asarray(frozen.whitener, np.float64)) ** -2 - whiten._FLOOR  # of the mean, falling
    assert len(shares) == 128
    assert round(shares[:20].sum() / shares.sum(), 3) == 0.985
    assert round(float(np.median(shares)), 2) == 0.01


@pytest.mark.parametrize("change", [{"grp": GRPConfig()}, {"trainable": "noxattn"}])
def test_refused_where_it_has_no_meaning(pipeline, change):
    with pytest.raises(aegis_jax.AegisError, match=r"preserve\.whiten=0\.25"):
        setup(pipeline, "star", dataclasses.replace(WHITE, **change))
