"""The shipped world draws what it is asked for."""

import json

import numpy as np
import pytest

from aegis_jax.world import WEIGHTS, captions, quality
from aegis_jax.world.concepts import ATTRIBUTES

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")


@pytest.fixture(scope="module")
def pipeline():
    from aegis_jax.io.pipeline import load_pipeline

    return load_pipeline("world")


# A standard error or two below what 576 prompts show (docs/world.md), for as many as there are here.
@pytest.mark.parametrize(("every", "least"), [pytest.param(1, 0.97, marks=pytest.mark.slow), (4, 0.92)])
def test_generations_are_judged_right(pipeline, monkeypatch, every, least):
    """Of every combination, or of every fourth by a stride that goes through all values."""
    whole = captions.every_combination

    def some(*args):
        prompts, labels = whole(*args)
        rows = np.arange(0, 5 * len(prompts), 5)[: len(prompts) // every] % len(prompts)
        return [prompts[i] for i in rows], labels[rows]

    monkeypatch.setattr(captions, "every_combination", some)
    result = quality.measure(pipeline, repeats=1, seed=77)
    assert result["prompts"] == 192 // every
    for row in ("judge", "agreement", "clip"):
        assert min(result[row].values()) >= least, result[row]
    assert set(result["by_value"]["shape"]) == {v.name for v in ATTRIBUTES["shape"]}
    assert f"{192 // every} prompts" in quality.table(result)
    json.dumps(result)


@pytest.mark.slow
def test_the_picture(pipeline, tmp_path):
    image = pytest.importorskip("PIL.Image")
    quality.grid(pipeline, tmp_path / "grid.png")
    with image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (64 + 24 * 64, 34 + 8 * 64)
