"""The shipped world draws what it is asked for."""

import json

import numpy as np
import pytest
from PIL import Image

from aegis_jax import world
from aegis_jax.errors import AegisError
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
def test_the_picture(pipeline):
    picture = quality.grid(pipeline)
    assert picture.size == (64 + 24 * 64, 34 + 8 * 64)


def test_a_picture_is_never_drawn_over_a_file(tmp_path, monkeypatch):
    """What is there, or cannot be written, is told before anything is drawn."""
    monkeypatch.setattr(quality, "grid", lambda *args, **kwargs: Image.new("RGB", (3, 2)))
    world.show(tmp_path / "new.png")
    with Image.open(tmp_path / "new.png") as picture:
        assert picture.size == (3, 2)
    monkeypatch.delattr(quality, "grid")
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(AegisError, match="mine.png exists: name another file .--out."):
        world.show(tmp_path / "mine.png")
    with pytest.raises(AegisError, match="nowhere is no folder: make it or name another file .--out."):
        world.show(tmp_path / "nowhere/new.png")
    assert (tmp_path / "mine.png").read_text() == "mine" and not (tmp_path / "nowhere").exists()
