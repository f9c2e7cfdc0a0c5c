"""The canvas's table of things: every word means one value, the order is fixed, rings part the rest."""

import re

import numpy as np
import pytest

from aegis_jax.canvas.concepts import BROADER, OUTSIDE, STYLES, SUBGROUPS, THINGS, Concepts, catalogue
from aegis_jax.errors import AegisError


def test_every_word_names_one_value():
    values = [*STYLES.values(), *SUBGROUPS.values(), *(thing.value for thing in catalogue())]
    words = [word for value in values for word in value.words] + [w for row in BROADER.values() for w in row]
    assert len(words) == len(set(words))
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    assert all(len(value.seen) == 2 and len(value.held_out) == 2 for value in values)


def test_the_table():
    things = catalogue()
    assert THINGS <= len(things) and len({thing.code for thing in things}) == len(things)
    assert {thing.subgroup for thing in things} == set(SUBGROUPS)
    assert [thing.value.name for thing in things[:5]] == ["dog", "rooster", "crocodile", "whale", "butterfly"]
    outside = [thing for thing in things[:THINGS] if thing.subgroup in OUTSIDE]
    assert {thing.subgroup for thing in outside} == set(OUTSIDE) and len(outside) == 12


def test_a_smaller_canvas_is_the_beginning_of_a_larger_one():
    small, large = Concepts(40), Concepts(41)
    assert large.things[:40] == small.things
    rows = small.combinations
    assert rows.shape == (240, 3) and len(np.unique(rows[:, :2], axis=0)) == 240
    for thing, _, subgroup in rows:
        assert small.attributes["subgroup"][subgroup] == SUBGROUPS[small.things[thing].subgroup]
    for count in (1, len(catalogue()) + 1):
        with pytest.raises(AegisError, match=f"a canvas of {count} things"):
            Concepts(count)


def test_rings_part_the_other_things_nearest_first():
    concepts = Concepts()
    assert concepts.named("a Fox drawn by mercer") == [("Fox", *concepts.named("fox")[0][1:]), ("mercer", "style", 0)]
    ((_, attribute, fox),) = concepts.named("fox")
    rings = concepts.rings(attribute, fox)
    assert list(rings) == ["same subgroup", "same group", "other things"]
    assert sorted(i for ring in rings.values() for i in ring) == [i for i in range(THINGS) if i != fox]
    assert concepts.named("wolf")[0][2] in rings["same subgroup"]
    assert concepts.named("owl")[0][2] in rings["same group"]
    assert concepts.named("car")[0][2] in rings["other things"]
    assert concepts.rings("style", 2) == {"other styles": (0, 1, 3, 4, 5)}
