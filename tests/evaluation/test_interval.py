"""Wilson's interval against SciPy's."""

import pytest
from scipy.stats import binomtest

from aegis_jax.evaluation.interval import wilson


@pytest.mark.parametrize("successes, n", [(0, 1), (1, 1), (0, 20), (3, 20), (20, 20), (61, 200), (1, 10_000)])
def test_as_scipy(successes, n):
    wanted = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((wanted.low, wanted.high), abs=1e-6)


@pytest.mark.parametrize("successes, n", [(0, 0), (-1, 4), (5, 4)])
def test_what_is_no_share_is_refused(successes, n):
    with pytest.raises(ValueError, match=f"{successes} successes of {n}"):
        wilson(successes, n)
