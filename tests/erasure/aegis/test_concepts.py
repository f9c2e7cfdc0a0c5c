"""Several concepts in a batch: each latent is one concept's, and a concept's soft tokens answer for its own latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.diffusion.conditioning import per_latent
from aegis_jax.erasure import groups, latents, trainable
from aegis_jax.erasure.aegis import step as step_lib
from aegis_jax.erasure.aegis.config import EraseConfig, GRPConfig, LatentsConfig, SoftConfig, latents_of_concepts
from aegis_jax.erasure.aegis.setup import freeze, setup
from aegis_jax.erasure.latents import Noised

CONCEPTS = ["red star", "heart", "blue"]
CONFIG = EraseConfig(
    eta=2.0,
    trainable="kv",
    soft=SoftConfig(beta=2e-3, gamma=5e-3, life="run"),
    grp=GRPConfig(rule="none"),  # so that Adam's mean is 0.1 g_e
    latents=LatentsConfig(steps=4),
)


@pytest.mark.parametrize(("concepts", "batch"), [(1, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2), (5, 3), (2, 8)])
def test_round_robin(concepts, batch):
    """Against counting: whose latents come, and how many steps each concept had."""
    seen = np.zeros(concepts, int)
    for step in range(12):
        turn = jax.tree.map(np.asarray, step_lib._turn(jnp.int32(step), 2 * concepts, concepts, batch))
        dealt = (step * batch + np.arange(batch)) % (2 * concepts)
        np.testing.assert_array_equal(per_latent(turn.prompts, batch), dealt)
        np.testing.assert_array_equal(turn.concepts, turn.prompts % concepts)
        mine = turn.own
        np.testing.assert_array_equal(per_latent(mine, batch), dealt % concepts)
        np.testing.assert_array_equal(turn.concepts[: len(mine)], mine)
        assert sorted(mine) == sorted(set((dealt % concepts).tolist()))
        np.testing.assert_array_equal(turn.visits, seen[mine])
        seen[mine] += 1


@pytest.mark.parametrize(("steps", "batch", "concepts"), [(10, 1, 3), (7, 4, 5), (3, 2, 6), (1000, 1, 1), (5, 8, 3)])
def test_latents_of_each_concept(steps, batch, concepts):
    """Against counting how they are dealt."""
    dealt = np.arange(steps * batch) % concepts
    found = latents_of_concepts(EraseConfig(steps=steps, batch=batch), concepts)
    assert found == np.bincount(dealt, minlength=concepts).tolist()
    assert sum(found) == steps * batch and min(found) > 0


def one_step(patch, pipeline, concepts, given, tokens, step=0, **soft):
    """The state on the host after one `erase_step` from a given drift, z_t, t and soft tokens."""
    z_t, t = (jnp.asarray(given[name]) for name in ("z_t", "t"))
    config = dataclasses.replace(CONFIG, batch=len(t), soft=dataclasses.replace(CONFIG.soft, **soft))
    patch.setattr(latents, "fresh", lambda *args, **kwargs: (Noised(z_t, t), jnp.int32(0)))
    state, frozen = setup(pipeline, concepts, config)
    v, p = (jnp.asarray(x) for x in tokens)
    state = dataclasses.replace(state, step=jnp.int32(step), drift=groups.stack(given["drift"]), v=v, p=p)
    after, metrics = step_lib.erase_step(state, frozen, config)
    return jax.device_get((after, metrics))


@pytest.fixture(scope="module")
def given(pipeline):
    rng = np.random.default_rng(5)
    chosen = trainable.select(pipeline.unet.params, CONFIG.trainable)
    return {
        "z_t": rng.normal(size=(2, 8, 8, 4)).astype(np.float32),
        "t": np.array([333, 720], np.int32),
        "drift": {path: 0.05 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in chosen.items()},
    }


@pytest.mark.parametrize(("step", "dealt"), [pytest.param(0, (0, 1), marks=pytest.mark.slow), (1, (2, 0))])
def test_a_mixed_batch_is_the_mean_of_its_concepts(monkeypatch, pipeline, given, step, dealt):
    """From the same z_t and t: gradient and loss are the means of one-concept steps, the sign steps those steps'."""
    start, _ = setup(pipeline, CONCEPTS, CONFIG)
    soft = jax.device_get((start.v, start.p))
    mixed, metrics = one_step(monkeypatch, pipeline, CONCEPTS, given, soft, step)
    alone = []
    for i, concept in enumerate(dealt):
        own = given | {name: given[name][i : i + 1] for name in ("z_t", "t")}
        tokens = [x[concept : concept + 1] for x in soft]
        alone.append(one_step(monkeypatch, pipeline, [CONCEPTS[concept]], own, tokens))
    for name in ("L_aet", "L_adv", "L_e"):
        np.testing.assert_allclose(metrics[name], np.mean([m[name] for _, m in alone]), 1e-3, err_msg=name)
    for name, ours in mixed.opt_state.mu.items():
        wanted = np.mean([state.opt_state.mu[name] for state, _ in alone], axis=0)
        assert np.linalg.norm(ours - wanted) <= 2e-3 * np.linalg.norm(wanted), name
    for name, size, before in (("v", CONFIG.soft.beta, soft[0]), ("p", CONFIG.soft.gamma, soft[1])):
        after = getattr(mixed, name)
        for concept, (state, _) in zip(dealt, alone, strict=True):
            choices = [(before[concept] + np.float32(turn)).astype(np.float32) for turn in (0, size, -size)]
            assert np.logical_or.reduce([after[concept] == choice for choice in choices]).all()
            # A sign may turn where the gradient is nearly 0.
            assert (after[concept] == getattr(state, name)[0]).mean() > 0.95
        (idle,) = set(range(len(CONCEPTS))) - set(dealt)
        assert after[idle].tobytes() == before[idle].tobytes()


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_prefixes_are_as_the_concept_named_again(monkeypatch, pipeline, given, step):
    """From the same z_t and t, two concepts with two prefixes each make the step of four concepts."""
    twice = [*CONCEPTS[:2], *CONCEPTS[:2]]
    start, _ = setup(pipeline, twice, CONFIG)
    soft = jax.device_get((start.v, start.p))
    wanted, their_metrics = one_step(monkeypatch, pipeline, twice, given, soft, step)
    found, metrics = one_step(monkeypatch, pipeline, CONCEPTS[:2], given, soft, step, prefixes=2)
    for name in ("v", "p", "drift"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), getattr(wanted, name))
    assert metrics["L_e"] == their_metrics["L_e"]
    moved = (found.p != soft[1]).any((1, 2))
    assert moved.tolist() == ([False, False, True, True] if step else [True, True, False, False])


def test_each_latent_is_guided_by_its_own_concept(pipeline):
    """A mixed draw consists of the latents that draws for one concept have at the same places."""
    frozen = freeze(pipeline, CONCEPTS[:2], CONFIG)
    seed = next(n for n in range(50) if int(draw_s(jax.random.key(n))) == 2)  # far enough for the prompt to show

    def draw(chosen):
        cond = jax.tree.map(lambda x: x[jnp.array(chosen)], frozen.concept_emb)
        how = {"batch": 3, "steps": CONFIG.latents.steps, "offset": False}
        return np.asarray(latents.fresh(frozen, frozen.unet, cond, jax.random.key(seed), **how)[0].z)

    mixed, first, second = draw([0, 1]), draw([0]), draw([1])
    assert np.abs(first - second).max(axis=(1, 2, 3)).min() > 1e-3
    np.testing.assert_allclose(mixed, np.stack([first[0], second[1], first[2]]), atol=1e-5)


def draw_s(key):
    return jax.random.randint(jax.random.split(key, 3)[0], (), 0, CONFIG.latents.steps, jnp.int32)
