"""evaluation/retention.py: near words, what is asked for, and distances by each ruler."""

import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.evaluation import retention, world
from aegis_jax.evaluation.metrics.frechet import frechet
from aegis_jax.evaluation.metrics.neighbours import near
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.world.concepts import ATTRIBUTES

RED = world.find("red")


def test_near_values_are_those_of_the_text_encoder_and_the_users():
    base = load_pipeline("world")
    names = [v.name for values in ATTRIBUTES.values() for v in values if v.name != "red"]
    found = [word for word, _ in near(base, "red", names, retention.NEAREST)]
    assert retention.near_values(base, RED) == found and len(found) == retention.NEAREST
    (other, *_) = [name for name in names if name not in found]
    assert retention.near_values(base, RED, [found[0], other]) == [*found, other]
    assert retention.named_values(RED, ["a navy thing"]) == ["blue"]
    for text in ("crimson", "dog", "blue star"):
        with pytest.raises(AegisError, match=f"--near '{text}'"):
            retention.named_values(RED, [text])


def test_prompts_for_near_words_name_them_and_never_the_concept(monkeypatch):
    asked = {}

    def rates(pipeline, judge, prompts, **how):
        asked.update(prompts)

    monkeypatch.setattr(retention, "shown_rates", rates)
    retention.near_rates(None, RED, ["blue", "heart"], None, n=41, seed=3)
    for word, texts in asked.items():
        value = world.find(word).value
        assert len(texts) == 20 and all(set(text.split()) & set(value.seen) for text in texts)
        assert not any(set(text.split()) & set(RED.value.words) for text in texts)


def test_seeds_of_retention_are_apart_from_those_of_the_evaluation():
    mine = {retention._seed(seed, kind) for seed in range(50) for kind in range(4)}
    theirs = {world.noise_seed(seed, kind) for seed in (*range(50), 99_999) for kind in range(10)}
    assert len(mine) == 200 and not mine & theirs


def test_distances_are_of_each_ruler_to_each_set():
    rng = np.random.default_rng(0)
    sets = {name: rng.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8) for name, n in (("real", 9), ("base", 7))}
    images = rng.integers(0, 256, (8, 4, 4, 3)).astype(np.uint8)
    rulers = {"mean": lambda x: x.mean((1, 2)), "corner": lambda x: x[:, 0, 0].astype(float)}
    parts = {"real": iter([sets["real"][:4], sets["real"][4:]]), "base": [sets["base"]]}
    found = retention.distances(rulers, images, retention.featured(rulers, parts))
    assert list(found) == [f"frechet_{ruler}_{name}" for ruler in rulers for name in sets]
    for ruler, of in rulers.items():
        for name, other in sets.items():
            assert found[f"frechet_{ruler}_{name}"] == {"value": frechet(of(images), of(other)), "n": 8}
