"""The shipped world draws what it is asked for."""

import json

import pytest

from aegis_jax.world import WEIGHTS, quality
from aegis_jax.world.concepts import ATTRIBUTES

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")


@pytest.fixture(scope="module")
def pipeline():
    from aegis_jax.io.pipeline import load_pipeline

    return load_pipeline("world")


def test_generations_of_every_combination_are_judged_right(pipeline):
    result = quality.measure(pipeline, repeats=1, seed=77)
    assert result["prompts"] == 192
    # A standard error or two below what 576 prompts show (README): there are 192 here.
    for row, least in (("judge", 0.97), ("agreement", 0.98), ("clip", 0.97)):
        assert min(result[row].values()) >= least, result[row]
    assert set(result["by_value"]["shape"]) == {v.name for v in ATTRIBUTES["shape"]}
    assert "192 prompts" in quality.table(result)
    json.dumps(result)


@pytest.mark.slow
def test_the_picture(pipeline, tmp_path):
    image = pytest.importorskip("PIL.Image")
    quality.grid(pipeline, tmp_path / "grid.png")
    with image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (64 + 24 * 64, 34 + 8 * 64)
