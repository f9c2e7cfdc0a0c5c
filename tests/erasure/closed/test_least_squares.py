"""The mathematics of the closed forms, whatever the model: what holds for all rows and projections."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegis_jax.erasure.closed import oce, rece, speed, uce
from aegis_jax.erasure.closed.config import SPEEDConfig

D = 12  # width of the text embedding
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)
SCALES = {"erase_scale": 1.5, "preserve_scale": 0.6, "lamb": 0.3}


def rows(seed, n, like_clip=False):
    """n rows; like_clip: long, and much alike, as those of a prompt are."""
    rng = np.random.default_rng([seed, n])
    found = rng.standard_normal((n, D))
    return 28 * (rng.standard_normal(D) + 0.05 * found) if like_clip else found


@few
@given(seeds, st.booleans())
def test_one_concept_alone_is_mapped_exactly_and_nothing_else_moves(seed, like_clip):
    """At N = 1, with nothing preserved and lamb -> 0; what is orthogonal to the concept stays."""
    x, goal, other = rows(seed, 1, like_clip), rows(seed + 1, 1), rows(seed + 2, 1)
    change = uce.edit(x, goal, np.zeros((0, D)), erase_scale=1.0, preserve_scale=1.0, lamb=0.0)
    np.testing.assert_allclose(x + x @ change, goal, 1e-9, 1e-9)
    other = other - (other @ x.T) / (x @ x.T) * x
    np.testing.assert_allclose(other @ change, 0, atol=1e-10)


@few
@given(seeds)
def test_a_smaller_lamb_comes_nearer_to_the_limit(seed):
    x, goal, held = rows(seed, 3), rows(seed + 1, 3), rows(seed + 2, 4)
    limit = uce.edit(x, goal, held, **SCALES | {"lamb": 0.0})
    away = [np.abs(uce.edit(x, goal, held, **SCALES | {"lamb": lamb}) - limit).max() for lamb in (1e-2, 1e-5, 1e-8)]
    assert away[0] > away[1] > away[2] and away[2] < 1e-4 * np.abs(limit).max()


@few
@given(seeds, st.booleans())
def test_the_edit_is_the_least_of_its_objective(seed, like_clip):
    """No gradient is left, for any projection W; so it is what the paper's inverse gives, however ill-conditioned."""
    x, goal, held = rows(seed, 3, like_clip), rows(seed + 1, 3), rows(seed + 2, 5)
    w = rows(seed + 3, 7).T
    e, p, lamb = SCALES.values()
    change = uce.edit(x, goal, held, **SCALES) @ w
    parts = e * x.T @ ((x - goal) @ w + x @ change), p * held.T @ (held @ change), lamb * change
    assert np.abs(sum(parts)).max() < 1e-9 * max(np.abs(part).max() for part in parts)


@few
@given(seeds, st.permutations(range(4)))
def test_the_order_of_concepts_and_of_preserved_texts_does_not_matter(seed, order):
    x, goal, held = rows(seed, 4), rows(seed + 1, 4), rows(seed + 2, 4)
    one = uce.edit(x, goal, held, **SCALES)
    other = uce.edit(x[list(order)], goal[list(order)], held[::-1], **SCALES)
    np.testing.assert_allclose(one, other, 1e-9, 1e-12)


@few
@given(seeds, st.booleans(), st.sampled_from([0.0, 0.5]))
def test_erasing_a_text_to_itself_changes_nothing(seed, like_clip, lamb):
    x, held = rows(seed, 3, like_clip), rows(seed + 1, 6)
    assert not uce.edit(x, x, held, **SCALES | {"lamb": lamb}).any()
    problem = problem_of(seed, goal=lambda x: x)
    assert not problem.change("", rows(seed + 5, 7).T).any()


@few
@given(seeds)
def test_preserved_rows_stay(seed):
    """All but exactly where they weigh much; exactly at lamb = 0 while no row is a mixture of the others."""
    x, goal, held = rows(seed, 2), rows(seed + 1, 2), rows(seed + 2, 5)
    for scales in (SCALES | {"lamb": 0.0}, SCALES | {"preserve_scale": 1e9}):
        change = uce.edit(x, goal, held, **scales)
        assert np.abs(held @ change).max() < 1e-6 * np.abs(x @ change).max()


@few
@given(seeds, st.floats(1e-3, 1.0))
def test_the_adversary_is_the_least_of_its_objective(seed, scale):
    before = [rows(seed + i, 7).T for i in range(3)]
    factor = np.eye(D) + 0.3 * rows(seed + 4, D)
    x, gram = rows(seed + 5, 2), sum(w @ w.T for w in before)
    a = rece.adversary(x, factor, gram, scale)
    gradient = sum((a @ factor @ w - x @ w) @ (factor @ w).T for w in before) + scale * a
    assert np.abs(gradient).max() < 1e-8 * np.abs(scale * a).max() + 1e-9 * np.abs(x @ gram).max()


def test_against_no_edit_the_adversary_is_the_concept_itself():
    x, w = rows(0, 2), rows(1, 2 * D).T
    np.testing.assert_allclose(rece.adversary(x, np.eye(D), w @ w.T, 1e-12), x, 1e-6)


def problem_of(seed, goal=None, **changes):
    x = rows(seed, 1)
    pairs = [(x, rows(seed + 1, 1) if goal is None else goal(x))]
    config = SPEEDConfig(**{"aug_num": 0, "threshold": 1e-9} | changes)
    return speed.Problem.of(pairs, rows(seed + 2, 4), rows(seed + 3, 2), config)


@few
@given(seeds, st.sampled_from([0.1, 1.0]))
def test_speed_is_the_least_of_its_objective_among_what_the_constraints_allow(seed, retain_scale):
    """The constraints solved away by a basis of what is orthogonal to both kinds of rows: plain ridge is left."""
    problem, w = problem_of(seed, retain_scale=retain_scale), rows(seed + 4, 7).T
    found = problem.change("", w)
    apart = np.concatenate([problem.preserved, problem.fixed])
    scale = np.abs(found).max()
    assert np.abs(apart @ found).max() < 1e-8 * scale
    basis = np.linalg.svd(apart)[2][len(apart) :].T
    system = basis.T @ problem.square @ basis + retain_scale * np.eye(basis.shape[1])
    wanted = basis @ np.linalg.solve(system, basis.T @ problem.cross @ w)
    np.testing.assert_allclose(found, wanted, 1e-7, 1e-9 * scale)


def test_speed_without_a_free_direction_changes_nothing():
    problem = problem_of(0)
    assert problem.change("", rows(4, 7).T).any()
    full = speed.Problem.of([(rows(0, 1), rows(1, 1))], rows(2, 3 * D), rows(3, 2), SPEEDConfig(threshold=1e-9))
    assert not full.change("", rows(4, 7).T).any()


def test_the_filter_keeps_what_the_plain_edit_moves():
    """Two of the rows are orthogonal to the concept, which alone the plain edit maps: no influence on them."""
    x = np.eye(D)[:1]
    kept = np.stack([np.eye(D)[0] + np.eye(D)[5], np.eye(D)[1], np.eye(D)[2]])
    problem = speed.Problem.of([(x, rows(1, 1))], kept, rows(3, 2), SPEEDConfig(aug_num=5))
    found = problem.rows_to_keep(rows(4, 7).T)
    np.testing.assert_array_equal(found[0], kept[0])
    assert 1 < len(found) <= 6  # that row and some of its five copies
    assert np.linalg.matrix_rank(found - kept[0], tol=1e-9) == 1  # moved along one direction


@few
@given(seeds)
def test_no_rotation_has_a_larger_trace(seed):
    rng = np.random.default_rng(seed)
    m, others = rng.standard_normal((6, 6)), np.linalg.qr(rng.standard_normal((20, 6, 6)))[0]
    found = oce.nearest_rotation(m)
    np.testing.assert_allclose(found.T @ found, np.eye(6), atol=1e-12)
    assert np.linalg.det(found) == pytest.approx(1)
    others[:, :, 0] *= np.linalg.det(others)[:, None]
    small = np.linalg.qr(np.eye(6) + 1e-3 * rng.standard_normal((20, 6, 6)))[0]  # and those near to it
    small *= np.sign(np.diagonal(small, axis1=1, axis2=2))[:, None]
    assert np.trace(found.T @ m) > max(np.trace(q.T @ m) for q in [*others, *(found @ small)]) - 1e-9


@few
@given(seeds, st.sampled_from([0.0, 3.0]))
def test_outputs_are_turned_and_no_more(seed, erase_scale):
    """Norms and angles stay, and the order of concepts and how long their rows are do not matter."""
    w, x, goals = rows(seed, 7).T, rows(seed + 1, 2), rows(seed + 2, 2)
    held, moment = rows(seed + 3, 3), rows(seed + 4, D)
    scales = {"erase_scale": erase_scale, "preserve_scale": 0.3, "generic_scale": 0.5, "lamb": 1.5}
    found = oce.change(w, x, goals, held, moment.T @ moment / D, **scales)
    np.testing.assert_allclose((w + found) @ (w + found).T, w @ w.T, atol=1e-9)
    again = oce.change(w, 3 * x[::-1], goals[::-1], held, moment.T @ moment / D, **scales)
    np.testing.assert_allclose(found, again, atol=1e-9)
    assert np.abs(found).max() > 1e-3 or not erase_scale
    assert np.abs(found).max() < 1e-9 or erase_scale


def test_a_direction_said_twice_counts_once():
    v = rows(0, 2)
    one, twice = oce.projector(v), oce.projector(np.concatenate([v, 5 * v[:1], np.zeros((1, D))]))
    np.testing.assert_allclose(one, twice, atol=1e-12)
    assert np.trace(one) == pytest.approx(2)


@pytest.mark.parametrize("length", [2, 3, 24])
def test_the_invariants_are_bos_and_centres_of_clusters(length):
    empty = np.random.default_rng(length).standard_normal((length, D))
    found = speed.invariants(empty)
    count = min(speed.CLUSTERS, length - 1)
    assert found.shape == (1 + count, D)
    np.testing.assert_array_equal(found[0], empty[0])
    nearest = ((empty[1:, None] - found[1:]) ** 2).sum(2).argmin(1)
    for i in set(nearest):
        np.testing.assert_allclose(found[1 + i], empty[1:][nearest == i].mean(0), 1e-9)


def test_the_published_inverse_would_lose_digits_in_float32():
    """Why float64: rows as long and as alike as CLIP's, by the paper's inverse in float32, against the same in ours."""
    x, goal = rows(3, 9, like_clip=True), rows(4, 9)
    ours = uce.edit(x, goal, np.zeros((0, D)), **SCALES | {"lamb": 1e-3})
    gram, cross = x.T @ x, x.T @ (goal - x)
    system = SCALES["erase_scale"] * gram + 1e-3 * np.eye(D)
    exact = np.linalg.inv(system) @ (SCALES["erase_scale"] * cross)
    single = np.linalg.inv(system.astype(np.float32)) @ (SCALES["erase_scale"] * cross).astype(np.float32)
    error = lambda m: np.abs(x @ (m - exact)).max() / np.abs(x @ exact).max()  # noqa: E731
    assert error(ours) < 1e-6 < 1e-4 < error(single)
