"""The search for words: what it asks, what it keeps, what it pays; on a tiny pipeline whose pictures say their text."""

import numpy as np
import pytest

from aegis_jax.attacks import attack
from aegis_jax.attacks.given import Viewer
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from tests.tiny import FEWEST

IMAGES = np.zeros((2, 8, 8, 3), np.uint8)
SMALL = {"tokens": 2, "budget": 300, "per_query": 2, "population": 10, "picked": 5, "image_steps": 2}


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny(**FEWEST))


@pytest.fixture
def asked(monkeypatch):
    """Pictures whose first pixel says how many of a text's words are "church" and "heart"; what was asked for."""
    calls = []

    def call(self, prompts, start):
        calls.append((list(prompts), np.asarray(start)))
        self.unet_evaluations += len(start)
        hits = [len({"church", "heart"} & set(text.split()[:-1])) for text in prompts]
        return np.array(hits, np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)

    monkeypatch.setattr(Viewer, "__call__", call)
    return calls


def half(images):
    return images[:, 0, 0, 0] / 2


@pytest.mark.parametrize("search", ["evolution", "random"])
def test_it_finds_the_words_that_work_within_its_budget(pipeline, asked, search):
    found = attack(
        pipeline, "star", method="word-search", images=IMAGES, probability=half, search=search, restarts=2,
        **SMALL | {"budget": 1000},
    )  # fmt: skip
    drawn = sum(len(texts) for texts, _ in asked)
    assert found.generated == found.unet_evaluations == drawn <= 2 * 1000
    assert found.losses.shape == (49, 2)  # (1000 - 4 * 5) // 20 generations
    if search == "evolution":
        assert {frozenset(text.split()) for text in found.prompts} == {frozenset({"church", "heart", "star"})}
        assert (found.losses[-1] == 0).all()
    first, second, last = asked[0], asked[1], asked[-1]
    assert len(first[0]) == 40 and all(text.endswith(" star") and len(text.split()) == 3 for text in first[0])
    assert (first[1][:2] == first[1][2:4]).all() and not (first[1][:2] == first[1][20:22]).any()  # by restart
    assert not (first[1][:2] == second[1][:2]).any()  # by generation
    kept = set(first[0][:20]) & set(second[0][:20])
    assert len(kept) == 5 if search == "evolution" else len(kept) < 5
    assert len(last[0]) == 2 * 4 * 5 and not (last[1][:5, None] == first[1][None, :2]).any()


def test_the_pick_is_by_other_pictures_than_the_search(pipeline, asked):
    seen = []

    def lucky(images):  # in the search every phrase looks as good; on the last pictures the third does
        seen.append(len(images))
        return np.ones(len(images)) if len(images) != 20 or len(seen) == 1 else np.repeat([0.1, 0.2, 0.9, 0.3], 5)

    found = attack(pipeline, "star", method="word-search", images=IMAGES, probability=lucky, **SMALL | {"per_query": 3})
    assert found.prompts == [asked[-1][0][10]] and found.pick == 0


@pytest.mark.parametrize("place, wanted", [("behind", "star {}"), ("alone", "{}"), ("neutral", "{} dog")])
def test_places(pipeline, asked, place, wanted):
    how = {"images": IMAGES, "probability": half, "place": place, "neutral": "dog"}
    found = attack(pipeline, "star", method="word-search", **how, **SMALL | {"budget": 50})
    assert found.prompts[0].startswith(wanted.split("{}")[0]) and found.prompts[0].endswith(wanted.split("{}")[1])
    assert all(len(text.split()) == 2 + (place != "alone") for texts, _ in asked for text in texts)
    names = [text.split().count("star") for texts, _ in asked for text in texts]
    assert min(names) >= 1 if place == "behind" else max(names) == 0  # which leave the name out


def test_the_name_is_a_word_like_others_where_it_stands_anyway(pipeline, asked):
    attack(pipeline, "star", method="word-search", images=IMAGES, probability=half, **SMALL | {"search": "random"})
    assert any(text.split().count("star") > 1 for texts, _ in asked for text in texts)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"probability": None}, "needs a judge that says how likely"),
        ({"budget": 30}, "budget=30 is below one generation and its picks, 40"),
        ({"search": "grid"}, "search='grid', wanted one of: evolution, random"),
        ({"place": "prefix_k"}, "place='prefix_k' is unknown"),
        ({"per_query": 0}, "per_query=0"),
    ],
)
def test_bad_input_is_named(pipeline, change, message):
    with pytest.raises(AegisError, match=message):
        attack(pipeline, "star", method="word-search", images=IMAGES, **SMALL | {"probability": half} | change)
