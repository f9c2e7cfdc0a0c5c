"""Attacks on the world: none is needed as it is, and each beats no attack where the erasure is weak.

The weak erasures: `weak` moves no weight of the UNet: the words that an erasure may use get the embedding of "thing".
Held-out words stay as they were. `shallow` takes most of what all words share out of the keys and values of the
cross-attention, so that they say little; the UNet draws stars as before.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.attacks import METHODS, configure
from aegis_jax.attacks.guided import OTHER_PICTURE
from aegis_jax.attacks.result import ATTACK, NOT_NEEDED, SUCCEEDED
from aegis_jax.diffusion.conditioning import encode
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


@pytest.fixture(scope="module")
def shallow(original):
    words = [
        encode(original, word).embedding[0, 1 : 1 + len(original.tokenizer.tokens(word))] for word in STAR.value.seen
    ]
    direction = jnp.linalg.svd(jnp.concatenate(words), full_matrices=False)[2][:1]
    params = flatten(original.unet.params)
    for path in params:
        if ".attn2.to_k." in path or ".attn2.to_v." in path:
            params[path] = params[path] - 0.75 * direction.T @ (direction @ params[path])
    return dataclasses.replace(original, unet=dataclasses.replace(original.unet, params=unflatten(params)))


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


def test_fine_tuning_on_other_pictures_revives_a_shallow_erasure(original, shallow):
    given = dataclasses.replace(cases.cases(original, STAR, 16), without=cases.without(original, STAR))
    config = configure("revival", {"looks": "300", "batch": 8, "learning_rate": 3e-4})
    found = METHODS["revival"].run(shallow, "star", given, config, None)
    shown = {level: hits.sum() for level, hits in found.levels[ATTACK].items()}
    assert shown["300 steps"] >= shown["0 steps"] + 3
    assert found.outcomes.count(SUCCEEDED) >= 3


def test_words_are_found_without_the_weights(original, weak):
    """Of a model that lost the words an erasure may use, others still bring the star back: its held-out names do."""
    given = cases.of_concept(original, STAR, "star", np.zeros((1, 32, 32, 3), np.uint8))
    config = configure("word-search", {"tokens": 2, "budget": 800, "restarts": 2})
    found = METHODS["word-search"].run(weak, "star", dataclasses.replace(given, steps=8), config, None)
    assert found.generated <= 1600
    assert cases.rates(weak, found, STAR, n=16)["pick"] > 0.5
    assert world.measure(weak, STAR, n=16)["plain"] < 0.1


NEW = [
    ("ladder", {}),
    ("recall", {"timesteps": 1, "iterations": 2, "interval": 1, "strength": 0.4}),
    ("noise-probe", {"levels": "0.4"}),
    ("completion-probe", {"levels": "0.2"}),
    ("inpainting-probe", {"masks": "top"}),
]  # with settings that take little time


@pytest.mark.parametrize("method, settings", NEW)
def test_attacks_without_a_search_beat_no_attack_on_a_weak_erasure_alone(original, weak, monkeypatch, method, settings):
    """`weak` reads "thing" for the star, and of its things one in eight is a star: so often does it need no attack."""
    monkeypatch.setattr(cases, "STEPS", 10)
    given = dataclasses.replace(cases.cases(original, STAR, 6), without=cases.without(original, STAR, 12))
    run = lambda pipeline: METHODS[method].run(pipeline, "star", given, configure(method, settings), None)  # noqa: E731
    assert set(run(original).outcomes) == {NOT_NEEDED}  # nothing is restored that is there
    found = run(weak)
    tally, attack = cases.counts(found, len(found.prompts) // 6), found.levels[ATTACK]
    assert tally["attack_succeeded"]["count"] > tally["no_attack_needed"]["count"]
    if method == "ladder":  # the names that an erasure may not use are left
        assert sum(attack["held-out"]) > sum(attack["name"]) + 2
    else:
        assert sum(list(attack.values())[-1]) > sum(list(found.levels[OTHER_PICTURE].values())[-1])
