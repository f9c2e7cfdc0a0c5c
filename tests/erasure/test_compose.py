"""Merged erasures: what the closed form has to do, by its definition and by cases that have one answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegis_jax.erasure.compose import Merged, answers, interference, outside, summed
from aegis_jax.errors import AegisError

D = 10
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


def erasure(seed, n=2):
    """(change of two projections, rows)."""
    rng = np.random.default_rng(seed)
    return {"k": rng.standard_normal((D, 4)), "v": rng.standard_normal((D, 6))}, rng.standard_normal((n, D))


def merged(erasures, preserved=None, **how):
    total = Merged(D, preserved, **how)
    for change, rows in erasures:
        total.add(change, rows)
    return total.solve()


@few
@given(seeds)
def test_one_alone_is_reproduced_on_its_own_rows_and_is_nothing_elsewhere(seed):
    change, rows = erasure(seed)
    found = merged([(change, rows)])
    for path, d in change.items():
        np.testing.assert_allclose(rows @ found[path], rows @ d, 1e-8, 1e-9)
        other = np.linalg.svd(rows)[2][len(rows) :]  # orthogonal to the rows
        np.testing.assert_allclose(other @ found[path], 0, atol=1e-8)


@few
@given(seeds)
def test_while_rows_are_no_mixtures_of_others_each_is_reproduced_and_preserved_rows_stay(seed):
    erasures = [erasure(seed + i) for i in range(3)]
    preserved = erasure(seed + 9, 3)[1]
    found = merged(erasures, preserved)
    for change, rows in erasures:
        for path, d in change.items():
            np.testing.assert_allclose(rows @ found[path], rows @ d, 1e-5, 1e-5)
    assert all(np.abs(preserved @ d).max() < 1e-5 for d in found.values())
    with_sum = summed(change for change, _ in erasures)
    change, rows = erasures[0]
    assert np.abs(rows @ with_sum["k"] - rows @ change["k"]).max() > 1e-2  # the plain sum interferes


@few
@given(seeds, st.floats(0.01, 10), st.floats(0.001, 1))
def test_it_is_the_least_of_its_objective(seed, lamb, eps):
    """More rows than dimensions: a compromise, of which no gradient is left."""
    erasures = [erasure(seed + i, 5) for i in range(3)]
    preserved = erasure(seed + 9, 4)[1]
    found = merged(erasures, preserved, lamb=lamb, eps=eps)
    for path in ("k", "v"):
        gradient = lamb * preserved.T @ (preserved @ found[path]) / (preserved**2).sum() + eps * found[path]
        for change, rows in erasures:
            gradient += rows.T @ (rows @ (found[path] - change[path])) / (rows**2).sum()
        assert np.abs(gradient).max() < 1e-10 * max(1, np.abs(found[path]).max())


@few
@given(seeds, st.permutations(range(3)))
def test_the_order_and_how_often_rows_are_repeated_do_not_matter(seed, order):
    erasures = [erasure(seed + i) for i in range(3)]
    one = merged(erasures)
    again = merged([(erasures[i][0], np.concatenate([erasures[i][1]] * 3)) for i in order])
    for path, d in one.items():
        np.testing.assert_allclose(d, again[path], 1e-6, 1e-8)


@few
@given(seeds)
def test_outside_the_preserved_rows(seed):
    change, preserved = erasure(seed, 3)
    found = outside(change, preserved)
    for path, d in found.items():
        np.testing.assert_allclose(preserved @ d, 0, atol=1e-9)
        other = np.linalg.svd(preserved)[2][3:]
        np.testing.assert_allclose(other @ d, other @ change[path], 1e-9, 1e-9)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_plain_sum_has_the_tensors_of_all(order):
    one, other = erasure(0)[0], erasure(1)[0]
    changes = [one, {"k": other["k"]}, {"conv": other["v"]}]
    found = summed(changes[i] for i in order)
    assert found.keys() == {"k", "v", "conv"}
    for path, wanted in {"k": one["k"] + other["k"], "v": one["v"], "conv": other["v"]}.items():
        np.testing.assert_allclose(found[path], wanted, 1e-12)


def test_interference():
    """Concept 1's rows are orthogonal to all that erasure 0 changes; erasure 1 does to concept 0 twice its own."""
    rows = [np.eye(D)[:1], np.eye(D)[1:2]]
    first = {"k": np.zeros((D, 3))}
    first["k"][0] = 1.0
    second = {"k": np.zeros((D, 3))}
    second["k"][:2] = [[2.0] * 3, [5.0] * 3]
    nothing = {"k": np.zeros((D, 3))}

    def found(*changes):
        return interference(np.array([[np.linalg.norm(answers(change, x)) for x in rows] for change in changes]))

    np.testing.assert_allclose(found(first, second), [[1, 0], [2, 1]])
    assert np.isnan(found(first, nothing)[:, 1]).all()


def test_what_cannot_be_merged_is_refused():
    change, rows = erasure(0)
    with pytest.raises(AegisError, match="no erasure to merge"):
        Merged(D).solve()
    with pytest.raises(AegisError, match="lamb=-1"):
        Merged(D, rows, lamb=-1)
    for bad in (rows[:, :3], rows[:0], rows[0]):
        with pytest.raises(AegisError, match="wanted \\(n, 10\\)"):
            merged([(change, bad)])
    with pytest.raises(AegisError, match="v is not in all"):
        merged([(change, rows), ({"k": change["k"]}, rows)])
    with pytest.raises(AegisError, match="inputs of width 4"):
        merged([({"k": change["k"][:4]}, rows)])
