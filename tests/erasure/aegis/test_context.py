"""The concept among random words: whose turn it is, and the push that follows what is left, in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegis_jax.diffusion.conditioning import Conditioning
from aegis_jax.erasure.aegis import context
from aegis_jax.erasure.aegis import step as step_lib
from aegis_jax.erasure.aegis.state import Goal
from aegis_jax.erasure.aegis.words import Words


@pytest.mark.parametrize(("prompts", "batch"), [(1, 1), (1, 4), (2, 4), (4, 4), (4, 1), (8, 4), (3, 2), (3, 4)])
def test_every_prompt_is_in_context_half_of_the_time(prompts, batch):
    """And its goal has the push of the target there as elsewhere."""
    mark = lambda value, *shape: jnp.full(shape, value)  # noqa: E731
    of_prompt = [[] for _ in range(prompts)]  # whether in context, latent by latent
    for step in range(4 * prompts):
        dealt = step_lib._turn(jnp.int32(step), prompts, 1, batch).prompts
        alone = Goal(Conditioning(mark(0.0, len(dealt), 1, 1)), mark(0.0, batch, 1, 1, 1))
        there = Words(None, Conditioning(mark(1.0, batch, 1, 1)), mark(1.0, batch, 1, 1, 1), None)
        push = mark(0.25, batch, 1, 1, 1)
        inside = context.whose_turn(jnp.int32(step), dealt, prompt_count=prompts, batch=batch)
        goal = context.in_context(inside, dealt, alone, push, there, None, None)
        np.testing.assert_array_equal(goal.cond.embedding.ravel(), inside)
        np.testing.assert_array_equal(goal.eps.ravel(), np.asarray(inside) + 0.25)
        for latent, is_inside in enumerate(np.asarray(inside)):
            of_prompt[int(dealt[latent % len(dealt)])].append(bool(is_inside))
    assert all(sum(inside) == len(inside) / 2 for inside in of_prompt)


def test_each_latent_is_pushed_by_its_own_concept():
    """Two concepts of three prefixes each: prompts 4, 5 and 0 belong to concepts 0, 1 and 0."""
    dealt, batch = jnp.array([4, 5, 0]), 3
    noise = lambda value: jnp.full((batch, 2, 2, 1), value)  # noqa: E731
    alone = Goal(Conditioning(jnp.zeros((3, 1, 1))), noise(7.0))
    there = Words(None, Conditioning(jnp.ones((batch, 1, 1))), noise(1.0), noise(10.0))
    kappa = jnp.array([2.0, 3.0])
    inside = context.whose_turn(jnp.int32(0), dealt, prompt_count=6, batch=batch)
    for shown, strength in ((None, [2.0, 3.0, 2.0]), (jnp.array([0.0, 1.0, 1.0]), [1.0, 4.0, 3.0])):
        goal = context.in_context(inside, dealt, alone, noise(0.0), there, kappa, shown)
        pushed = 1.0 - np.array(strength) * 10.0
        np.testing.assert_array_equal(goal.eps[:, 0, 0, 0], np.where(inside, pushed, 7.0))
    assert 0 < inside.sum() < batch


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 6))
def test_kappa_follows_what_is_left(seed, concepts, batch):
    """Against a loop in float64; theta's predictions are a share of what the concept adds, and noise."""
    rng = np.random.default_rng(seed)
    shape = (batch, 4, 4, 2)
    words, noise = rng.normal(size=(2, *shape))
    d = rng.normal(size=shape) * 10 ** rng.uniform(-3, 0, size=(batch, 1, 1, 1))  # from below the floor to far above
    eps = words + rng.uniform(-1, 1, size=(batch, 1, 1, 1)) * d + 1e-2 * noise
    inside = rng.integers(0, 2, batch).astype(bool)
    prompts = rng.integers(0, 2 * concepts, min(batch, 2 * concepts))
    kappa, rate = rng.uniform(0, 10, concepts), rng.uniform(0, 1)
    wanted, num, den = kappa.copy(), np.zeros(concepts), np.zeros(concepts)
    for i in np.flatnonzero(inside):
        k = prompts[i % len(prompts)] % concepts
        energy = np.mean(d[i] ** 2)
        num[k] += np.mean((eps - words)[i] * d[i]) / (energy + 3e-5)
        den[k] += energy / (energy + 3e-5)
    seen = den > 0
    wanted[seen] = np.clip(kappa[seen] + rate * num[seen] / den[seen], 0, 10)
    eps, words, d, rate, kappa = (jnp.asarray(x, jnp.float32) for x in (eps, words, d, rate, kappa))
    there = Words(None, None, words, d)
    found, share = context.next_kappa(kappa, jnp.asarray(prompts), jnp.asarray(inside), eps, there, rate)
    np.testing.assert_allclose(found, wanted, 1e-3, 1e-3)
    np.testing.assert_allclose(share, num.sum() / den.sum() if seen.any() else 0.0, 1e-3, 1e-3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 6))
def test_kappa_follows_what_is_shown(seed, concepts, batch):
    """By the share of each concept's latents in context whose trajectory shows it; without such a latent it stays."""
    rng = np.random.default_rng(seed)
    inside, shown = rng.integers(0, 2, (2, batch))
    prompts, kappa = rng.integers(0, 2 * concepts, min(batch, 2 * concepts)), rng.uniform(0, 10, concepts)
    own = np.resize(prompts % concepts, batch)
    wanted = kappa.copy()
    for k in range(concepts):
        of = shown[(own == k) & (inside == 1)]
        wanted[k] = min(kappa[k] + context.RATE_SHOWN * of.mean(), 10) if len(of) else kappa[k]
    args = jnp.asarray(kappa, jnp.float32), jnp.asarray(prompts), jnp.asarray(inside, bool)
    found, share = context.next_kappa_shown(*args, jnp.asarray(shown, jnp.float32))
    np.testing.assert_allclose(found, wanted, 1e-5)
    np.testing.assert_allclose(share, shown[inside == 1].mean() if inside.any() else 0.0, 1e-5, 1e-6)


def test_kappa_rests_for_two_thirds_of_a_run():
    rates = [float(context.rate_now(jnp.int32(step), steps=9)) for step in range(9)]
    assert rates == [0.0] * 6 + [context.RATE] * 3
