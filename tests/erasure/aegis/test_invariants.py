"""What the method's page promises of a run (its invariants), held against a short real one with two concepts."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import aegis_jax
from aegis_jax.erasure import aegis
from aegis_jax.erasure.aegis.config import EraseConfig, LatentsConfig, SoftConfig, WordsConfig
from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.erasure.aegis.step import erase_step

BETA, GAMMA = 2e-3, 5e-3
CONFIG = EraseConfig(
    steps=4,
    learning_rate=1e-3,
    trainable="kv",
    soft=SoftConfig(beta=BETA, gamma=GAMMA, life="run"),
    words=WordsConfig(preserve=1.0, context="push"),
    latents=LatentsConfig(steps=4),
)
CONCEPTS = ["star", "red heart"]


@dataclasses.dataclass(frozen=True)
class Run:
    states: list  # before the first step and after every step, on the host
    metrics: list
    frozen_before: list
    frozen_after: list


def short_run(pipeline, config=CONFIG) -> Run:
    state, frozen = setup(pipeline, CONCEPTS, config)
    before = jax.device_get(jax.tree.leaves(frozen))
    states, metrics = [jax.device_get(state)], []
    for _ in range(config.steps):
        state, measured = erase_step(state, frozen, config)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(measured))
    return Run(states, metrics, before, jax.device_get(jax.tree.leaves(frozen)))


@pytest.fixture(scope="module")
def run(pipeline):
    return short_run(pipeline)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_first_step_has_nothing_to_retain(run):
    """At step 0 theta is theta0: L_r and every projection are 0, so Adam receives g_e itself."""
    assert not any(leaf.any() for leaf in jax.tree.leaves(run.states[0].drift))
    first = run.metrics[0]
    assert first["L_r"] == 0 and first["conflict_share"] == 0 and first["mean_cosine"] == 0
    assert first["update_dot_gr"] == 0 and first["flip_share"] == 0 and first["omega"] == 0
    assert not first["per_tensor"]["cosine"].any() and not first["per_tensor"]["kept"].any()
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(first))
    assert not any(leaf.any() for leaf in jax.tree.leaves(run.states[0].conflict))


def test_kappa_rests_at_first(run):
    """At theta0 all of the concept is left; from two thirds of the steps on each kappa moves in its concept's turns."""
    kappas = np.array([state.kappa for state in run.states])
    assert run.metrics[0]["left_in_context"] == pytest.approx(1, abs=1e-3)
    assert not kappas[: 2 * CONFIG.steps // 3 + 1].any() and kappas[-1].any()
    for n, metrics in enumerate(run.metrics):
        rise = kappas[n + 1] - kappas[n]
        assert rise[(n + 1) % 2] == 0
        in_context = (n % 2 + n // 2) % 2 == 0  # every other visit of each concept
        if n >= 2 * CONFIG.steps // 3 and in_context:
            np.testing.assert_allclose(rise[n % 2], 0.5 * metrics["left_in_context"], 1e-5)
        else:
            assert rise[n % 2] == 0 and (in_context or metrics["left_in_context"] == 0)
        np.testing.assert_allclose(metrics["kappa"], kappas[n + 1].mean(), 1e-6)


def test_drift_is_measured(run):
    """L_r is half the squared drift before the step, drift_norm its root after it."""
    for before, after, metrics in zip(run.states, run.states[1:], run.metrics, strict=False):
        squared = [
            sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(state.drift))
            for state in (before, after)
        ]
        np.testing.assert_allclose(metrics["L_r"], squared[0] / 2, 1e-5)
        np.testing.assert_allclose(metrics["drift_norm"], np.sqrt(squared[1]), 1e-5)
        moved = jax.tree.map(lambda a, b: np.sum((a - b) * b), after.drift, before.drift)
        np.testing.assert_allclose(metrics["update_dot_gr"], sum(jax.tree.leaves(moved)), 1e-3, 1e-6 * squared[1])
    assert run.metrics[-1]["drift_norm"] > 0


def test_frozen_side_is_untouched(run, pipeline, folder):
    assert bits(run.frozen_before) == bits(run.frozen_after)
    reloaded = aegis_jax.load_pipeline(folder)
    for part in ("unet", "vae", "text_encoder"):
        assert bits(getattr(pipeline, part).params) == bits(getattr(reloaded, part).params)


def test_omega_moves_before_it_is_used(run):
    """By mu against the sign of <g_e, P_before>, within 0 and the cap; -1 is a flip."""
    mu, cap = CONFIG.grp.mu, CONFIG.grp.cap
    omega = np.zeros_like(run.metrics[0]["per_tensor"]["omega"])
    for metrics in run.metrics:
        told = metrics["per_tensor"]
        omega = np.clip(omega - np.float32(mu) * told["kept"], 0, cap)
        np.testing.assert_allclose(told["omega"], omega, 1e-6)
        np.testing.assert_allclose(metrics["omega"], omega.mean(), 1e-6)
        np.testing.assert_allclose(metrics["flip_share"], (told["kept"] < 0).mean(), 1e-6)
    assert any(np.abs(metrics["per_tensor"]["kept"]).any() for metrics in run.metrics[2:])


@pytest.mark.parametrize(("name", "size"), [("v", BETA), ("p", GAMMA)])
def test_sign_steps_and_turns(run, name, size):
    """Step n moves concept n mod 2 only, every coordinate of it by 0 or exactly the step size."""
    for n, (before, after) in enumerate(zip(run.states, run.states[1:], strict=False)):
        before, after = getattr(before, name), getattr(after, name)
        idle, due = (n + 1) % 2, n % 2
        assert before[idle].tobytes() == after[idle].tobytes()
        rounded = [(before[due] + step).astype(np.float32) for step in np.float32([0, size, -size])]
        assert np.logical_or.reduce([after[due] == choice for choice in rounded]).all()
        assert (after[due] != before[due]).mean() > 0.5


def test_same_seed_same_bits(run, pipeline):
    again = short_run(pipeline)
    assert bits(run.states) == bits(again.states)
    assert bits(run.metrics) == bits(again.metrics)


def test_another_seed_starts_elsewhere(run, pipeline):
    other, _ = setup(pipeline, CONCEPTS, dataclasses.replace(CONFIG, seed=1))
    assert not np.array_equal(other.v, run.states[0].v)
    assert not np.array_equal(other.p, run.states[0].p)


def word_rows(pipeline):
    table = pipeline.text_encoder.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    return np.asarray(table, np.float32)[pipeline.tokenizer.word_ids]


@pytest.fixture(scope="module")
def redrawn(pipeline):
    """The same run with v and p drawn anew at every step."""
    soft = dataclasses.replace(CONFIG.soft, life="step", tokens=2)
    return short_run(pipeline, dataclasses.replace(CONFIG, soft=soft))


@pytest.mark.parametrize(("name", "size"), [("v", BETA), ("p", GAMMA)])
def test_tokens_that_live_for_a_step_are_words_moved_once(redrawn, pipeline, name, size):
    """After a step each token is some word of the vocabulary moved by one sign step, wherever it was before."""
    words, nearest = word_rows(pipeline), []
    choices = np.stack([(words + step).astype(np.float32) for step in np.float32([0, size, -size])])
    for n, (before, after) in enumerate(zip(redrawn.states, redrawn.states[1:], strict=False)):
        before, after = getattr(before, name), getattr(after, name)
        idle, due = (n + 1) % 2, n % 2
        assert before[idle].tobytes() == after[idle].tobytes()
        for token in after[due]:
            is_of = (choices == token).any(0).all(-1)  # (W,)
            assert is_of.sum() == 1
            nearest.append(int(is_of.argmax()))
            assert (words[nearest[-1]] != token).mean() > 0.5
    assert len(set(nearest)) > 4  # of 8 tokens in 4 steps; kept ones would be 4


def test_only_the_trainable_set_changes_in_the_export(run, pipeline, folder, tmp_path):
    """In the exported folder every other tensor is the source's, bit for bit."""
    drift = aegis.drift(pipeline, run.states[-1], CONFIG)
    assert drift.keys() == {"unet"}
    aegis_jax.save_pipeline(pipeline, tmp_path / "out", drift=drift)
    changed = 0
    for path in sorted(folder.glob("*/*.safetensors")):
        source, ours = load_file(path), load_file(tmp_path / "out" / path.relative_to(folder))
        assert set(source) == set(ours)
        for key in source:
            assert ours[key].dtype == source[key].dtype
            trained = path.parent.name == "unet" and (".attn2.to_k." in key or ".attn2.to_v." in key)
            assert (source[key].tobytes() != ours[key].tobytes()) == trained, key
            changed += trained
    assert changed == 4  # keys and values of the two cross-attentions
