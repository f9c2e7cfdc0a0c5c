"""The projection onto the simplex against the closed form by sorting, and draws against their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aegis_jax.attacks.simplex import draw, project
from aegis_jax.attacks.spaces import Nearest, Simplex, first_moments, move

project = jax.jit(project)
NUMBERS = st.floats(-8, 8, width=32) | st.just(0.25) | st.just(1e-5)  # with ties, near and far from the simplex


def by_sorting(row):
    """Held, Wolfe and Crowder's closed form in float64."""
    row = row.astype(np.float64)
    ordered = np.sort(row)[::-1]
    mu = (np.cumsum(ordered) - 1) / np.arange(1, len(row) + 1)
    return np.maximum(row - mu[np.flatnonzero(ordered > mu)[-1]], 0)


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, (3, 40), elements=NUMBERS))
@example(np.full((3, 40), -8, np.float32))
def test_rows_are_the_nearest_of_the_simplex(rows):
    found = np.asarray(project(rows))
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found, [by_sorting(row) for row in rows], atol=1e-5)


def test_rows_of_a_whole_vocabulary_keep_their_sum():
    """At 49,408 tokens a threshold good to 1e-5 alone would leave a sum that is off by up to a half."""
    even = np.full((1, 49408), 1 / 49408, np.float32)
    moved = even + 0.01 * np.random.default_rng(0).choice([-1.0, 1.0], even.shape).astype(np.float32)
    for rows in (even, moved):
        found = np.asarray(project(rows), np.float64)
        np.testing.assert_allclose(found.sum(), 1, atol=1e-4)
        np.testing.assert_allclose(found[0], by_sorting(rows[0]), atol=1e-8)


def test_draws_follow_their_rows():
    rows = jnp.array([[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]])
    drawn = np.asarray(jax.vmap(lambda key: draw(key, rows))(jax.random.split(jax.random.key(0), 400)))
    assert set(drawn[:, 0]) == {1, 2} and set(drawn[:, 1]) == {3}
    assert 0.4 < (drawn[:, 0] == 1).mean() < 0.6


def test_the_gradient_of_one_hot_rows_is_cut():
    table = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    at_tokens = 0.5 * np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    found = Simplex(0.01, 0.1).gradient(jnp.asarray(at_tokens), jnp.asarray(table))
    whole = at_tokens.astype(np.float64) @ table.T
    assert (np.abs(whole) > 1).any()
    np.testing.assert_allclose(found, whole.clip(-1, 1), atol=1e-5)


def test_a_sign_step_has_no_weight_decay():
    space, rng = Simplex(0.01, 0.1, "sign"), np.random.default_rng(0)
    rows, gradient = rng.dirichlet(np.ones(6), (1, 2)).astype(np.float32), rng.standard_normal((1, 2, 6))
    found, _ = move(
        space, jnp.asarray(rows), first_moments(space, jnp.asarray(rows)), jnp.asarray(gradient, jnp.float32)
    )
    np.testing.assert_allclose(found[0], [by_sorting(row) for row in (rows - 0.01 * np.sign(gradient))[0]], atol=1e-6)


def test_embeddings_stand_for_the_token_of_the_largest_cosine():
    table = jnp.array([[10.0, 0.0], [0.0, 1.0], [3.0, 3.0], [0.0, 0.0]])  # the longest would win by inner product
    variable = jnp.array([[[0.1, 0.4], [5.0, 0.1], [0.01, 0.011]]])
    assert Nearest(0.1, 0.1, decoupled=True).settled(variable, table).tolist() == [[1, 0, 2]]
