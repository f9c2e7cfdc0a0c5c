"""Captions and concepts: word classes, held-out words, templates."""

import collections

import numpy as np
import pytest

from aegis_jax.world import captions
from aegis_jax.world.concepts import ATTRIBUTES, COMBINATIONS, find

VALUES = [(a, i, v) for a, values in ATTRIBUTES.items() for i, v in enumerate(values)]


def test_there_are_8_shapes_6_colours_4_textures_and_every_combination_once():
    assert {a: len(v) for a, v in ATTRIBUTES.items()} == {"shape": 8, "colour": 6, "texture": 4}
    assert len({tuple(row) for row in COMBINATIONS}) == 192


def test_every_word_belongs_to_exactly_one_value_and_to_no_filler():
    words = [w for _, _, v in VALUES for w in v.words] + captions.FILLERS
    assert [w for w, n in collections.Counter(words).items() if n > 1] == []
    assert sorted(words) == sorted(captions.words())


@pytest.mark.parametrize("attribute, index, value", VALUES)
def test_each_value_has_seen_and_held_out_words(attribute, index, value):
    assert len(value.seen) >= 2 and len(value.held_out) >= 2
    assert not set(value.seen) & set(value.held_out)
    assert all(find(word) == (attribute, index) for word in value.words)


def test_training_captions_use_every_word_and_say_what_they_claim():
    rng = np.random.default_rng(0)
    labels = np.tile(COMBINATIONS, (30, 1))
    texts, said = captions.sample(rng, labels)
    assert {w for t in texts for w in t.split()} >= {w for _, _, v in VALUES for w in v.words}
    for text, row, mask in zip(texts, labels, said, strict=True):
        found = {}
        for word in text.split():
            if word not in captions.FILLERS:
                attribute, index = find(word)
                found[attribute] = index
        assert found == {a: i for a, i, m in zip(ATTRIBUTES, row, mask, strict=True) if m}


def test_a_tenth_is_empty_and_attributes_are_sometimes_unsaid():
    texts, said = captions.sample(np.random.default_rng(1), np.tile(COMBINATIONS, (40, 1)))
    full = np.array([t != "" for t in texts])
    assert abs((~full).mean() - captions.EMPTY) < 0.01
    assert np.abs(1 - said[full].mean(0) - captions.UNSAID).max() < 0.02


def test_longest_caption():
    texts, _ = captions.sample(np.random.default_rng(2), np.tile(COMBINATIONS, (40, 1)))
    assert max(len(t.split()) for t in texts) <= captions.LONGEST


@pytest.mark.parametrize(
    "template, words, expected",
    [
        ("{a thing}", ("orb", "red", "striped"), "a striped red orb"),
        ("{a thing}", ("orb", "", ""), "an orb"),
        ("{a thing}", ("star", "emerald", ""), "an emerald star"),
        ("{a thing}", ("star", "red", "uniform"), "a uniform red star"),
        (
            "a picture of {a late}",
            ("annulus", "red", "dotted"),
            "a picture of an annulus that is dotted and red",
        ),
        ("{a late}", ("thing", "", ""), "a thing"),
        ("the {thing}", ("thing", "", "dotted"), "the dotted thing"),
    ],
)
def test_fill(template, words, expected):
    assert captions.fill(template, *words) == expected


def test_held_out_words_can_be_asked_for_or_avoided():
    rng = np.random.default_rng(3)
    held_out = {w for _, _, v in VALUES for w in v.held_out}
    for flag in (True, False):
        texts, labels = captions.every_combination(2, rng, held_out=flag)
        assert len(texts) == len(labels) == 384
        words = {w for t in texts for w in t.split()} - set(captions.FILLERS)
        assert words <= held_out if flag else not words & held_out


def test_canonical_names():
    assert captions.canonical([[3, 0, 1]]) == ["a striped red star"]
