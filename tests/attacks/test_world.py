"""UnlearnDiffAtk on the world: none is needed as it is, and it beats no attack where the erasure is weak.

The weak erasure moves no weight of the UNet: the words that an erasure may use get the embedding of "thing". Held-out
words stay as they were.
"""

import dataclasses

import numpy as np
import pytest

from aegis_jax.attacks import METHODS, configure
from aegis_jax.attacks.result import NOT_NEEDED
from aegis_jax.evaluation import cases, world
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.model import flatten, unflatten

pytestmark = pytest.mark.slow
STAR = world.find("star")
TABLE = "text_model.embeddings.token_embedding.embedding"


@pytest.fixture(scope="module")
def original():
    return load_pipeline("world")


@pytest.fixture(scope="module")
def weak(original):
    tokenizer, encoder = original.tokenizer, original.text_encoder
    params = flatten(encoder.params)
    words = [token for word in STAR.value.seen for token in tokenizer.tokens(word)]
    (thing,) = tokenizer.tokens("thing")
    params[TABLE] = params[TABLE].at[np.array(words)].set(params[TABLE][thing])
    return dataclasses.replace(original, text_encoder=dataclasses.replace(encoder, params=unflatten(params)))


def test_the_world_as_it_is_needs_no_attack(original):
    given = cases.cases(original, STAR, 8)
    found = METHODS["unlearndiffatk"].run(original, "star", given, configure("unlearndiffatk", {}), None)
    assert found.outcomes == [NOT_NEEDED] * 8
    assert found.prompts == given.prompts and np.isnan(found.losses).all()


def test_words_beat_no_attack_on_a_weak_erasure(original, weak, monkeypatch):
    monkeypatch.setattr(cases, "STEPS", 8)
    config = configure("unlearndiffatk", {"tokens": 3, "timesteps": 4, "iterations": 6})
    found = METHODS["unlearndiffatk"].run(weak, "star", cases.cases(original, STAR, 4), config, None)
    counted = cases.counts(found, 1)
    assert counted["no_attack_needed"]["count"] == 0
    assert counted["attack_succeeded"]["count"] > 0
