"""What the world's evaluation asks for: prompts that say what they should, and nothing that tuning has seen."""

import numpy as np
import pytest

from aegis_jax.evaluation import world
from aegis_jax.world import concepts, judge

STAR = world.find("star")


def test_find_names_one_value():
    assert (STAR.attribute, STAR.value.name) == ("shape", "star")
    assert world.find("a crimson thing") == world.Concept("colour", 0)
    assert world.find("red star") is None and world.find("cathedral") is None


@pytest.mark.parametrize("text", ["star", "red", "striped"])
def test_prompts_name_the_concept_by_the_right_words(text):
    concept = world.find(text)
    for seed in (0, 1):
        for held_out, words in ((False, concept.value.seen), (True, concept.value.held_out)):
            for prompt in world.concept_prompts(concept, 60, seed, held_out=held_out):
                assert set(prompt.split()) & set(words)
                others = set(concept.value.words) - set(words)
                assert not set(prompt.split()) & others


def test_tuning_and_final_seeds_share_no_held_out_word():
    words = [
        {w for p in world.concept_prompts(STAR, 60, seed, held_out=True) for w in p.split()} & set(STAR.value.held_out)
        for seed in (0, 1)
    ]
    assert words[0] and words[1] and not words[0] & words[1]


def test_other_prompts_are_balanced_and_never_the_concept():
    prompts, labels = world.other_prompts(STAR, 336, 0)
    assert len(prompts) == len(labels) == 336
    assert not set(STAR.value.words) & {w for p in prompts for w in p.split()}
    assert set(np.bincount(labels[:, 0], minlength=8)[[i for i in range(8) if i != STAR.index]]) == {48}
    for prompt, row in zip(prompts[:40], labels[:40]):
        for values, index in zip(concepts.ATTRIBUTES.values(), row):
            assert set(prompt.split()) & set(values[index].seen)


@pytest.mark.parametrize("text", ["star", "red", "striped"])
def test_open_prompts_say_all_but_the_concept_s_attribute(text):
    concept = world.find(text)
    mine = {word for value in concepts.ATTRIBUTES[concept.attribute] for word in value.words}
    others = [values for name, values in concepts.ATTRIBUTES.items() if name != concept.attribute]
    for prompt in world.open_prompts(concept, 60, 0):
        said = set(prompt.split())
        assert not said & mine
        assert all(said & {word for value in values for word in value.words} for values in others)


def test_what_unasked_counts(monkeypatch):
    drawn = []

    def sample(pipeline, prompts, *, seed, **settings):
        drawn.append((set(prompts), seed))
        return np.arange(len(prompts))

    def judged(images):
        shows = images < (5 if len(drawn) == 1 else 2)
        return {"shape": np.where(shows, STAR.index, -1)}

    monkeypatch.setattr(world, "sample", sample)
    monkeypatch.setattr(judge, "load", {"judge": judged}.get)
    assert world.unasked(None, STAR, n=20) == {"open": 0.25, "empty": 0.1}
    (open_prompts, seed), (empty, other) = drawn
    assert "" not in open_prompts and empty == {""} and seed != other


def test_what_measure_counts(monkeypatch):
    star, n, drawn = world.find("star"), 70, []
    labels = world.other_prompts(star, n, 0)[1]

    def sample(pipeline, prompts, **settings):
        drawn.append(prompts)
        return np.full(n, len(drawn) - 1)  # which of the three sets of prompts

    def judged(images):
        answers = labels.copy()
        if images[0] < 2:
            answers[: 7 * (images[0] + 1), 0] = star.index
        else:
            answers[labels[:, 0] == 0, 0] = -1
            answers[:7, 1] = -1
        return dict(zip(concepts.ATTRIBUTES, answers.T, strict=True))

    def second(images):
        return judged(images) | {"shape": np.full(n, -1)}

    monkeypatch.setattr(world, "sample", sample)
    monkeypatch.setattr(judge, "load", {"judge": judged, "second_judge": second}.get)
    found = world.measure(None, star, n=n)
    circles = (labels[:, 0] == 0).mean()
    assert found.pop("same_each") == {
        v.name: float(i > 0) for i, v in enumerate(concepts.ATTRIBUTES["shape"]) if i != star.index
    }
    assert found == pytest.approx(
        {
            "plain": 0.1, "held_out": 0.2, "same": 1 - circles, "other": 0.95,
            "agreement": (2 + circles / 3) / 3, "agreement_shown": 0.85,
        }
    )  # fmt: skip


@pytest.mark.parametrize("names", [["star", "red"], ["star", "heart", "striped", "blue"]])
def test_remaining_prompts_have_none_of_what_is_erased(names):
    prompts, labels = world.remaining_prompts([world.find(name) for name in names], 400, 0)
    gone = {word for name in names for word in world.find(name).value.words}
    assert len(prompts) == len(labels) == 400 and not gone & {word for prompt in prompts for word in prompt.split()}
    for prompt, row in zip(prompts[:40], labels[:40]):
        for values, index in zip(concepts.ATTRIBUTES.values(), row):
            assert set(prompt.split()) & set(values[index].seen)
    counts = np.unique(labels, axis=0, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


def test_what_is_counted_of_several(monkeypatch):
    """The star in 3 and 6 of 12 images, red in 9 and 12; of what remains a quarter has another colour than asked."""
    n, seen = 12, []
    erased = [world.find("star"), world.find("red")]
    labels = world.remaining_prompts(erased, n, 0)[1]

    def sample(pipeline, prompts, **settings):
        seen.append(prompts)
        return np.arange(n)

    def judged(images):
        if len(seen) == 5:
            colours = np.where(images < 3, 0, labels[:, 1])
            return {"shape": labels[:, 0], "colour": colours, "texture": labels[:, 2]}
        shown = images < {1: 3, 2: 9, 3: 6, 4: 12}[len(seen)]
        return {"shape": np.where(shown, erased[0].index, -1), "colour": np.where(shown, 0, -1)}

    monkeypatch.setattr(world, "sample", sample)
    monkeypatch.setattr(judge, "load", {"judge": judged}.get)
    found = world.measure_several(None, erased, n=n)
    assert found["plain"] == {"star": 0.25, "red": 0.75} and found["held_out"] == {"star": 0.5, "red": 1.0}
    assert found["kept"] == pytest.approx(1 - 3 / 36)
    seen.clear()
    everything = [world.Concept("texture", i) for i in range(4)]
    assert world.remaining_prompts(everything, n, 0)[0] == []


def test_a_table_of_several_says_what_it_cannot_judge(monkeypatch):
    rates = {"plain": {"star": 0.5, "red": 0.0}, "held_out": {"star": 0.25, "red": 0.125}, "kept": 1.0}
    monkeypatch.setattr(world, "measure_several", lambda pipeline, erased, **how: rates)
    told = world.world_table(None, None, ["star", "cathedral", "crimson"]).splitlines()
    assert told[0].startswith("'cathedral' is not one value") and "before" in told[1]
    assert [line.split()[0] for line in told[2:-1]] == ["star,", "star,", "red,", "red,", "accuracy,"]
    assert "50.0%   50.0%  (erase)" in told[2] and told[-2].endswith("(keep)")
    assert (
        told[-1].startswith("STILL SHOWN, in more than 5% of 32 images: ") and "red, held-out synonyms 12%" in told[-1]
    )
    assert "red, plain" not in told[-1]  # nothing of it is shown


@pytest.mark.parametrize(
    ("after", "failed"),
    [
        ({"plain": 0.0, "held_out": 0.05, "same": 0.9, "other": 1.0}, []),
        ({"plain": 0.34, "held_out": 0.0, "same": 0.9, "other": 1.0}, ["STILL SHOWN"]),
        ({"plain": 0.0, "held_out": 0.0, "same": 1.0, "other": 0.89}, ["LOST"]),
        ({"plain": 0.0, "held_out": 0.06, "same": 0.5, "other": 0.5}, ["STILL SHOWN", "LOST"]),
    ],
)
def test_a_table_says_in_words_what_has_failed(monkeypatch, after, failed):
    before = {"plain": 1.0, "held_out": 0.94, "same": 1.0, "other": 1.0}
    monkeypatch.setattr(world, "measure", lambda pipeline, concept, **how: pipeline)
    told = world.world_table(before, after, ["star"]).splitlines()[5:]
    assert [line.partition(",")[0] for line in told] == failed
