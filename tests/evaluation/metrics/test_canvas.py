"""UA, IRA and CRA: a case counted by hand, and the authors' way of averaging over values."""

import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.evaluation.interval import wilson
from aegis_jax.evaluation.metrics.canvas import accuracies

ASKED = {"style": ["Gogh", "Gogh", "Ink", "Ink", "Wool"], "object": ["dog", "cat", "dog", "cat", "dog"]}
ANSWERS = {"style": ["Ink", "Gogh", "Ink", "Gogh", "Wool"], "object": ["dog", "dog", "cat", "cat", "dog"]}


def test_by_hand():
    found = accuracies(ASKED, ANSWERS, "style", "Gogh")
    counts = {name: (row["count"], row["n"]) for name, row in found.items()}
    assert counts == {"UA": (1, 2), "IRA": (2, 3), "CRA": (3, 5), "CRA_retained": (2, 3)}
    assert found["CRA"]["share"] == 0.6 and found["CRA"]["interval"] == wilson(3, 5)
    found = accuracies(ASKED, ANSWERS, "object", "cat")
    assert [(row["count"], row["n"]) for row in found.values()] == [(1, 2), (2, 3), (3, 5), (2, 3)]


def test_as_the_authors_average():
    """A mean of the accuracies of each value, each of which has as many images."""
    rng = np.random.default_rng(0)
    styles, objects = (list("ABCD"), list("xyz"))
    asked = {"style": np.repeat(styles, 15), "object": np.tile(np.repeat(objects, 5), 4)}
    answers = {name: np.where(rng.random(60) < 0.7, row, rng.permutation(row)) for name, row in asked.items()}
    accuracy = {s: np.mean([a == s for q, a in zip(asked["style"], answers["style"]) if q == s]) for s in styles}
    by_object = [np.mean([a == o for q, a in zip(asked["object"], answers["object"]) if q == o]) for o in objects]
    found = {name: row["share"] for name, row in accuracies(asked, answers, "style", "B").items()}
    np.testing.assert_allclose(found["UA"], 1 - accuracy["B"])
    np.testing.assert_allclose(found["IRA"], np.mean([accuracy[s] for s in "ACD"]))
    np.testing.assert_allclose(found["CRA"], np.mean(by_object))


def test_several_other_domains_count_together():
    asked, answers = (rows | {"ground": ["a"] * 5} for rows in (ASKED, ANSWERS))
    assert accuracies(asked, answers, "style", "Gogh")["CRA"]["count"] == 3 + 5


@pytest.mark.parametrize(
    ("change", "domain", "target", "said"),
    [
        ({"object": ["dog"]}, "style", "Gogh", r"with \[1, 5\] values each"),
        ({}, "colour", "red", "'colour' is none of"),
        ({}, "style", "Monet", "no image asks for 'Monet'"),
        ({"ground": ["a"] * 5}, "style", "Gogh", "asked"),
    ],
)
def test_what_does_not_fit_is_refused(change, domain, target, said):
    with pytest.raises(AegisError, match=said):
        accuracies(ASKED, ANSWERS | change, domain, target)
