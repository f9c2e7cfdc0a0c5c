"""AGE's defaults, what there is to choose from, and how the choice moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.erasure import age
from aegis_jax.erasure import networks as networks_lib
from aegis_jax.erasure.aegis import words
from aegis_jax.erasure.age import step
from aegis_jax.erasure.age.candidates import chosen, medoids
from aegis_jax.erasure.age.config import LatentsConfig, TargetConfig
from aegis_jax.erasure.age.setup import setup
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.networks import networks
from aegis_jax.erasure.presets import preset
from aegis_jax.erasure.programs import given
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


def test_by_the_command_line_it_trains_what_was_published():
    """Whatever the run before it trained."""
    from aegis_jax.run import config as run_config

    run = run_config.merge(run_config.RunConfig(), {"method": "age"}, [])
    assert run.erase.trainable == "xattn"


def candidates(pipeline, concepts=("star",), **changes):
    """Words, one for each text."""
    net = networks(pipeline, "xattn", "float32", 50)
    found = chosen(net, pipeline.tokenizer, list(concepts), TargetConfig(**changes), 0)
    return [[i for (i,) in mine] for mine in found]


def test_candidates_are_near_words_and_none_means_a_concept(pipeline):
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder
    known = words.vocabulary(tokenizer, text.graph, text.params, ["star", "red"], 0)
    ids = np.asarray(known.words[: int(known.size)])
    everything = candidates(pipeline, ("star", "red"))
    assert everything[0] == everything[1] == ids.tolist()
    states = words.encodings(tokenizer, text.graph, text.params, [[int(i)] for i in ids], 3)
    for name, mine in zip(("star", "red"), candidates(pipeline, ("star", "red"), nearest=5)):
        own = words.encodings(tokenizer, text.graph, text.params, [tokenizer.tokens(name)], 3)
        nearest = np.argsort(np.linalg.norm(states - own, axis=1))[:5]
        assert set(mine) == set(ids[nearest].tolist())
    few = candidates(pipeline, nearest=8, centres=3)[0]
    assert 1 < len(few) <= 3 and set(few) < set(candidates(pipeline, nearest=8)[0])


@pytest.mark.parametrize("seed", range(5))
def test_of_each_cluster_one_is_taken(seed):
    """Of clusters far apart exactly one each, its most central."""
    rng = np.random.default_rng(seed)
    centres = 100 * rng.permutation(np.eye(6))[:4]
    points = np.concatenate([at + np.concatenate([[np.zeros(6)], rng.normal(size=(9, 6))]) for at in centres])
    points[::10] = [part.mean(0) for part in points.reshape(4, 10, 6)[:, 1:]]
    order = rng.permutation(len(points))
    found = medoids(points[order], 4, rng)
    assert sorted(order[found].tolist()) == [0, 10, 20, 30]
    assert len(medoids(np.ones((7, 3)), 4, rng)) == 1  # all the same


def test_it_can_be_traced(pipeline):
    """As aegis plan does it: what is chosen is then as many as there can be."""
    config = dataclasses.replace(CONFIG, target=TargetConfig(centres=4))

    def started(unet, text):
        parts = {"unet": unet, "text_encoder": text}
        parts = {name: dataclasses.replace(getattr(pipeline, name), params=params) for name, params in parts.items()}
        return setup(dataclasses.replace(pipeline, **parts), ["star", "red"], config)

    state, frozen = jax.eval_shape(started, pipeline.unet.params, pipeline.text_encoder.params)
    assert frozen.candidates.shape[:2] == state.pi.shape == (2, 4)
    after, metrics = jax.eval_shape(lambda *args: step.erase_step(*args, config), state, frozen)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state) and "L_adv" in metrics


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("dog",), "nothing to choose"),
        (("dog", "dog"), "nothing to choose"),
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
    assert moved[0].max() > 0 > moved[0].min()  # to and away from
    assert metrics["L_adv"] > 0 and metrics["L_p"] < 1e-6  # at theta0 nothing is hurt yet
    state, metrics = step.erase_step(state, frozen, config)
    np.testing.assert_allclose(np.abs(np.asarray(state.pi)[1]), config.target.learning_rate, 1e-2)
    np.testing.assert_array_equal(np.asarray(state.pi)[0], moved[0])
    assert metrics["L_p"] > 0


def test_the_adversary_goes_up(pipeline):
    """A small step of its own raises A at the same latents and noise; towards words that do not count none is taken."""
    target = TargetConfig(words=("dog", "cat", "church"), form="soft", top=3, temperature=1.0)
    config = dataclasses.replace(CONFIG, target=target)
    state, frozen = setup(responsive(pipeline), ["star"], config)
    rng = np.random.default_rng(0)
    at, kept = (Noised(jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.float32), jnp.array([500, 300])) for _ in "ab")
    moved = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), state.drift)
    net = networks_lib.moved(frozen.net, moved, "xattn")
    gumbel = jnp.array([[0.3, -0.2, 0.1]])
    args = frozen.net, net, at, kept, frozen.concept_emb, frozen.candidates
    more = given(1.0), given(1e-3)
    how = {"target": target, "remat": False}
    pi, moments, before = step._ascend(*args, state.pi, gumbel, state.moments, jnp.array([0]), *more, **how)
    _, _, after = step._ascend(*args, pi, gumbel, moments, jnp.array([1]), *more, **how)
    assert after > before
    hidden = jnp.array([[0.3, -0.2, -jnp.inf]])
    pi, _, _ = step._ascend(*args, state.pi, hidden, state.moments, jnp.array([0]), *more, **how)
    assert pi[0, 2] == 0 and (pi[0, :2] != 0).all()


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
