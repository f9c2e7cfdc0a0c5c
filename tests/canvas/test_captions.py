"""Captions of the canvas say what the picture shows, and `true_of` knows of which other pictures they are true."""

import numpy as np
import pytest

from aegis_jax.canvas import captions
from aegis_jax.canvas.captions import BROAD, KIN, OPEN, OWN
from aegis_jax.canvas.concepts import Concepts


@pytest.fixture(scope="module")
def drawn():
    concepts, rng = Concepts(), np.random.default_rng(0)
    labels = concepts.combinations[rng.integers(0, len(concepts.combinations), 3000)]
    return concepts, labels, *captions.sample(rng, labels, concepts)


def test_captions_name_what_said_says(drawn):
    concepts, labels, texts, said = drawn
    for text, row, (how, styled) in zip(texts, labels, said, strict=True):
        named = {attribute: index for _, attribute, index in concepts.named(text)}
        wanted = {"thing": row[0]} if how == OWN else {"subgroup": row[2]} if how == KIN else {}
        assert named == wanted | ({"style": row[1]} if styled else {}), text
    shares = [np.mean(said[:, 0] == how) for how in (OWN, KIN, BROAD, OPEN)]
    np.testing.assert_allclose(shares, [0.72, 0.09, 0.02, 0.17], atol=0.03)  # a tenth of all is empty
    assert abs(np.mean([text == "" for text in texts]) - captions.EMPTY) < 0.02
    assert abs(np.mean(said[:, 1]) - 0.9 * (1 - captions.UNSAID)) < 0.03


def test_every_word_is_known_and_none_is_too_long(drawn):
    known = set(captions.words())
    assert {word for text in drawn[2] for word in text.split()} <= known
    assert max(len(text.split()) for text in drawn[2]) <= captions.LONGEST


def test_true_of_agrees_with_a_slow_reading(drawn):
    concepts, labels, texts, said = (x[:120] if isinstance(x, list | np.ndarray) else x for x in drawn)
    found = captions.true_of(said, labels, concepts)
    for j, (how, styled) in enumerate(said):
        for i, row in enumerate(labels):
            a, b = concepts.things[row[0]], concepts.things[labels[j][0]]
            true = {
                OWN: a == b,
                KIN: a.subgroup == b.subgroup,
                BROAD: a.subgroup.split("-")[0] == b.subgroup.split("-")[0],
                OPEN: True,
            }[how] and (not styled or row[1] == labels[j][1])
            assert found[i, j] == true, (texts[j], a.value.name)
    assert found.diagonal().all() and not found.all()


def test_articles():
    assert captions.phrase("fox", "twemoji") == "a twemoji drawing of a fox"
    assert captions.phrase("owl", "emojione") == "an emojione drawing of an owl"
    told = {"grapes": "grapes", "corn": "corn", "bus": "a bus", "unicorn": "a unicorn", "dress": "a dress"}
    assert {word: captions.with_article(word) for word in told} == told
    assert captions.fill("{thing} {style} style", "fox", "noto") == "fox noto style"
