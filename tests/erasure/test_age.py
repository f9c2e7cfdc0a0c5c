"""AGE's defaults, what there is to choose from, and how the choice moves."""

import dataclasses

import jax
import numpy as np
import pytest

from aegis_jax.erasure import age
from aegis_jax.erasure.aegis import words
from aegis_jax.erasure.age import step
from aegis_jax.erasure.age.config import LatentsConfig, TargetConfig
from aegis_jax.erasure.age.setup import _candidates, setup
from aegis_jax.erasure.networks import networks
from aegis_jax.erasure.presets import preset
from aegis_jax.errors import AegisError
from tests.tiny import responsive

CONFIG = dataclasses.replace(preset("age").settings, compute_dtype="float32", latents=LatentsConfig(steps=4))


def test_the_published_numbers():
    """Of the published command for objects."""
    config = preset("age").settings
    assert (config.steps, config.batch, config.learning_rate, config.eta) == (1000, 1, 1e-5, 1.0)
    target = config.target
    assert (target.centres, target.learning_rate, target.temperature, target.form) == (100, 1e-2, 0.1, "hard")
    assert target.weight == 1.0 and config.trainable == "xattn"


def test_what_it_costs():
    """By hand: two draws of two latents, of 24.5 guided steps on average; a pool holds the concept's alone."""
    cost = age.method.cost(preset("age").settings, 1)
    assert cost.latents == pytest.approx(4 * 2 * 24.5)
    assert (cost.soft, cost.erasure) == pytest.approx((1 + 3 * 2.08, 3 + 2 * 3))
    pooled = dataclasses.replace(preset("age").settings, latents=LatentsConfig(50, 100))
    assert age.method.cost(pooled, 1).latents == pytest.approx(10 * 8 * 2 * 50 / 1000 + 2 * 2 * 24.5)


def test_candidates_are_near_words_without_the_concept_s(monkeypatch, pipeline):
    """All where they are few; else one of each cluster, of the nearest."""
    net = networks(pipeline, "xattn", "float32", 50)
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder
    known = words.vocabulary(tokenizer, text.graph, text.params, ["star"], 0)
    ids = np.asarray(known.words[: int(known.size)])

    def candidates(**changes):
        config = dataclasses.replace(CONFIG, target=TargetConfig(**changes))
        return np.asarray(_candidates(net, tokenizer, ["star"], config))[0]

    everything = candidates()
    assert len(everything) == len(ids)
    states = words.encodings(tokenizer, text.graph, text.params, [[int(i)] for i in ids], 3)
    own = words.encodings(tokenizer, text.graph, text.params, [tokenizer.tokens("star")], 3)
    distance = np.sort(np.linalg.norm(states - own, axis=1))
    # At the end-of-text token, as encoded there.
    found = np.linalg.norm(everything[:, 2] - own, axis=1)
    np.testing.assert_allclose(found, distance, 1e-4)
    few = candidates(nearest=8, centres=3)
    assert 1 < len(few) <= 3
    assert all(np.abs(everything[:8] - row).max((1, 2)).min() < 1e-5 for row in few)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("dog",), "nothing to choose"),
        (("dog", "a red star"), "names 'star', which is to be erased"),
        (("dog", "dog " * 90), "has no tokens or too many"),
    ],
)
def test_words_that_cannot_be_are_refused(pipeline, given, told):
    with pytest.raises(AegisError, match=told):
        setup(pipeline, "star", dataclasses.replace(CONFIG, target=TargetConfig(words=given)))


def test_pi_goes_up_and_belongs_to_its_concept(pipeline):
    """Of two concepts that take turns the first alone has moved after one step, by Adam's first step exactly."""
    target = TargetConfig(words=("dog", "cat", "church"), form="soft", top=3, temperature=1.0)
    config = dataclasses.replace(CONFIG, target=target)
    state, frozen = setup(responsive(pipeline), ["star", "red"], config)
    state, metrics = step.erase_step(state, frozen, config)
    moved = np.asarray(state.pi)
    assert (moved[1] == 0).all()
    np.testing.assert_allclose(np.abs(moved[0]), config.target.learning_rate, 1e-2)
    assert metrics["L_adv"] > 0 and metrics["L_p"] < 1e-6  # at theta0 nothing is hurt yet
    state, metrics = step.erase_step(state, frozen, config)
    np.testing.assert_allclose(np.abs(np.asarray(state.pi)[1]), config.target.learning_rate, 1e-2)
    np.testing.assert_array_equal(np.asarray(state.pi)[0], moved[0])
    assert metrics["L_p"] > 0


def test_a_mixture_of_the_likeliest():
    pi, gumbel = np.array([[0.0, 1.0, 2.0, -1.0]], np.float32), np.zeros((1, 4), np.float32)
    soft = np.asarray(jax.nn.softmax(pi / 2.0))
    two = np.asarray(step.mixture(pi, gumbel, TargetConfig(form="soft", top=2, temperature=2.0)))
    np.testing.assert_allclose(two, np.where(soft >= np.sort(soft)[0, -2], soft, 0) / np.sort(soft)[0, -2:].sum(), 1e-6)
    np.testing.assert_array_equal(step.mixture(pi, gumbel, TargetConfig(temperature=2.0)).round(6), [[0, 0, 1, 0]])


def test_what_changes(pipeline):
    names = age.tensors(pipeline, CONFIG)
    assert len(names) > 3 and all(".attn2." in name for name in names)
    assert "Only the UNet differs from the original" in age.described(CONFIG, 1)
