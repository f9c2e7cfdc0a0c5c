"""Near words by the text encoder, and how often labels are shown."""

import numpy as np
import pytest

from aegis_jax import judges
from aegis_jax.diffusion.sample import encode_text
from aegis_jax.errors import AegisError
from aegis_jax.evaluation.metrics import neighbours
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.judges.judge import Judge
from aegis_jax.world import WEIGHTS
from aegis_jax.world.concepts import ATTRIBUTES

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")


@pytest.fixture(scope="module")
def world():
    return load_pipeline("world")


def test_synonyms_come_first_then_values_of_the_attribute(world):
    words = [word for values in ATTRIBUTES.values() for value in values for word in value.words]
    hits = 0
    for values in ATTRIBUTES.values():
        for value in values:
            found = [word for word, _ in neighbours.near(world, value.name, words, 3)]
            assert value.name not in found
            hits += len(set(found) & set(value.words))
    assert hits / (3 * 18) > 0.9  # the three other words of each of 18 values
    names = [value.name for values in ATTRIBUTES.values() for value in values]
    shapes = [value.name for value in ATTRIBUTES["shape"]]
    assert set(word for word, _ in neighbours.near(world, "star", names, 5)) <= set(shapes)


def test_cosines_are_those_of_the_states_at_the_end_of_text(world):
    words = ["red", "blue", "star", "Circle", "circle"]
    found = neighbours.near(world, "circle", words, 10)
    assert [word for word, _ in found if word.lower() == "circle"] == []
    states = {}
    for word in ("circle", "red", "blue", "star"):
        end = len(world.tokenizer.tokens(word)) + 1
        states[word] = np.asarray(encode_text(world, word), np.float64)[0, end]
    mean = sum(states[word] for word in ("red", "blue", "star")) / 3
    for word, cosine in found:
        a, b = states[word] - mean, states["circle"] - mean
        np.testing.assert_allclose(cosine, a @ b / np.linalg.norm(a) / np.linalg.norm(b), atol=1e-5)
    assert [cosine for _, cosine in found] == sorted((cosine for _, cosine in found), reverse=True)
    with pytest.raises(AegisError, match="1 words besides 'circle'"):
        neighbours.near(world, "circle", ["red", "Circle"])


def test_rates_are_counted_by_label(monkeypatch):
    seen = {}

    def sample(pipeline, prompts, **settings):
        seen.update(prompts=prompts, **settings)
        return np.zeros((len(prompts), 2, 2, 3), np.uint8)

    rows = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.4, 0.6]])
    judge = Judge("fake", ("dog", "church, church building"), lambda images: rows, "0")
    monkeypatch.setattr(neighbours, "sample", sample)
    found = neighbours.shown_rates(
        None, judge, {"dog": ["a dog", "dogs"], "church": ["a church"] * 3}, seed=3, steps=2, guidance=5.0
    )
    counts = {name: (row["count"], row["n"]) for name, row in found.items()}
    assert counts == {"dog": (1, 2), "church": (2, 3), "all": (3, 5)}
    assert seen == {"prompts": ["a dog", "dogs"] + ["a church"] * 3, "seed": 3, "steps": 2, "guidance": 5.0}
    with pytest.raises(AegisError, match="no label 'cat'"):
        neighbours.shown_rates(None, judge, {"cat": ["a cat"]}, seed=0, steps=2, guidance=5.0)
    both = Judge("fake", ("dog", "all"), lambda images: rows, "0")
    with pytest.raises(AegisError, match="'all' stands for all words together"):  # it would be lost among the figures
        neighbours.shown_rates(None, both, {"all": ["all"], "dog": ["a dog"]}, seed=0, steps=2, guidance=5.0)


def test_the_world_shows_what_it_is_asked(world):
    prompts = {name: [f"a {name} star"] * 4 for name in ("red", "blue")} | {"star": ["a star"] * 4}
    found = neighbours.shown_rates(world, judges.load("world"), prompts, seed=0, steps=10, guidance=3.0)
    assert found["all"]["share"] >= 0.8, found
