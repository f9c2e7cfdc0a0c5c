"""The Frechet distance against matrix roots (SciPy), torchmetrics, and closed forms; all in float64."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.linalg

from aegis_jax.errors import AegisError
from aegis_jax.evaluation.metrics.frechet import frechet


def features(seed, n, d, scale=1.0):
    """Correlated, with a mean."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * scale + rng.standard_normal(d)


def by_matrix_root(a, b):
    """As pytorch-fid and clean-fid compute it."""
    (m, C), (k, D) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(C @ D)
    return np.square(m - k).sum() + np.trace(C + D - 2 * root.real)


SIZES = [(50, 70, 8), (40, 40, 30), (300, 200, 64)]


@pytest.mark.parametrize(("n", "k", "d"), SIZES)
def test_as_by_matrix_roots(n, k, d):
    a, b = features(0, n, d), features(1, k, d, 0.7)
    np.testing.assert_allclose(frechet(a, b), by_matrix_root(a, b), rtol=1e-8)


@pytest.mark.parametrize(("n", "k", "d"), SIZES)
def test_as_torchmetrics(n, k, d):
    torch = pytest.importorskip("torch")
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = features(2, n, d), features(3, k, d)
    moments = [torch.from_numpy(m) for x in (a, b) for m in (x.mean(0), np.cov(x, rowvar=False))]
    wanted = fid._compute_fid(moments[0], moments[1], moments[2], moments[3]).item()
    np.testing.assert_allclose(frechet(a, b), wanted, rtol=1e-8)


@hypothesis.given(st.integers(0, 2**32), st.integers(2, 40), st.integers(2, 40), st.integers(1, 20))
@hypothesis.settings(max_examples=50, deadline=None)
def test_what_it_does_not_depend_on(seed, n, k, d):
    rng = np.random.default_rng(seed)
    a, b = features(seed, n, d), features(seed + 1, k, d)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    distance, tolerance = frechet(a, b), {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(frechet(b, a), distance, **tolerance)
    np.testing.assert_allclose(frechet(a @ turn + 3, b @ turn + 3), distance, **tolerance)
    np.testing.assert_allclose(frechet(rng.permutation(a), b), distance, **tolerance)
    np.testing.assert_allclose(frechet(2 * a, 2 * b), 4 * distance, **tolerance)
    np.testing.assert_allclose(frechet(a, a), 0, atol=1e-9)


def test_a_shift_and_a_scale_have_closed_forms():
    a = features(5, 60, 10)
    shift = np.arange(10.0)
    np.testing.assert_allclose(frechet(a, a + shift), np.square(shift).sum(), rtol=1e-12)
    # Of a set and itself, scaled by s about its mean, it is (s - 1)^2 times the sum of its variances.
    centred = a - a.mean(0)
    for s in (2.0, 1.001):
        np.testing.assert_allclose(frechet(centred, s * centred), (s - 1) ** 2 * a.var(0, ddof=1).sum(), rtol=1e-6)


def test_fewer_images_than_features_lose_no_digits():
    """8 images of 200 features that span 3 directions: the distance is that of the 3, which a root of C1 C2 misses."""
    rng = np.random.default_rng(6)
    basis = np.linalg.qr(rng.standard_normal((200, 3)))[0]
    a = rng.standard_normal((8, 3))
    b = a + 1e-5 * rng.standard_normal((8, 3))
    wanted = frechet(a, b)
    assert 1e-12 < wanted < 1e-8
    np.testing.assert_allclose(frechet(a @ basis.T, b @ basis.T), wanted, atol=1e-14)
    assert abs(by_matrix_root(a @ basis.T, b @ basis.T) - wanted) > 1e-11


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), r"features are \(1, 3\) and \(5, 3\)"),
        (np.zeros((4, 3)), np.zeros((5, 2)), "wanted"),
        (np.zeros(4), np.zeros((5, 2)), "wanted"),
        (np.full((4, 2), np.nan), np.zeros((5, 2)), "not finite"),
    ],
)
def test_bad_features_are_refused(a, b, said):
    with pytest.raises(AegisError, match=said):
        frechet(a, b)
