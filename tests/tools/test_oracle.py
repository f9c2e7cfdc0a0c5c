"""The retrained oracle: it never sees the value, and all that an erasure leaves alone is the world's own."""

import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.model import flatten
from aegis_jax.world import captions, concepts
from tools.world import oracle, stages

PLAN = stages.Plan(pool=192, unet_rounds=(2, 2))


@pytest.mark.parametrize("word", ["asterisk", "red", "striped"])  # a held-out word names its value as well
def test_no_picture_and_no_caption_of_the_value(word):
    attribute, index = concepts.find(word)
    column = list(concepts.ATTRIBUTES).index(attribute)
    shop = oracle.Workshop(None, 0, PLAN, value=(column, index))
    images, label = shop.pool
    everything = stages.Workshop(None, 0, PLAN).pool
    keep = everything[1][:, column] != index
    assert 0 < keep.sum() < len(keep)
    np.testing.assert_array_equal(images, everything[0][keep])
    said = " ".join(captions.sample(np.random.default_rng(0), np.repeat(label, 20, 0))[0]).split()
    value = concepts.ATTRIBUTES[attribute][index]
    others = {word for other in concepts.ATTRIBUTES[attribute] if other is not value for word in other.words}
    assert not set(said) & set(value.words) and others <= set(said)


@pytest.mark.slow
def test_only_the_unet_is_new(tmp_path):
    folder = oracle.train_oracle(tmp_path / "run", without="star", plan=PLAN, log=lambda line: None)
    made, world = load_pipeline(folder), load_pipeline("world")
    for part in ("vae", "text_encoder"):
        mine, theirs = (flatten(getattr(pipeline, part).params) for pipeline in (made, world))
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine), part
    mine, theirs = flatten(made.unet.params), flatten(world.unet.params)
    assert not any(np.array_equal(mine[name], theirs[name]) for name in mine if name.endswith("kernel"))
    assert 'without "star"' in (folder / "README.md").read_text()


def test_a_folder_is_of_one_value_and_seed(tmp_path):
    oracle._claim(tmp_path / "oracle.json", {"without": "star", "seed": 0})
    oracle._claim(tmp_path / "oracle.json", {"without": "star", "seed": 0})
    with pytest.raises(AegisError, match="begun with.*star.*name another folder"):
        oracle._claim(tmp_path / "oracle.json", {"without": "red", "seed": 0})


def test_a_word_of_no_value_and_a_seed_out_of_range(tmp_path, capsys):
    with pytest.raises(AegisError, match="'dog' names no value"):
        oracle.train_oracle(tmp_path / "a", without="dog")
    with pytest.raises(SystemExit) as stopped:
        oracle.main(["--out", str(tmp_path / "a"), "--without", "star", "--seed", "-1"])
    assert stopped.value.code == 2 and "wanted 0 to 2**32 - 1" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
