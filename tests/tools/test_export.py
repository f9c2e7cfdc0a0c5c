"""Exporting the shipped world's own parameters gives the shipped files again."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.model import flatten
from aegis_jax.world import WEIGHTS, clip, judge
from tools.world import export, train
from tools.world.subject import WORLD

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")


def test_the_shipped_world_comes_back(tmp_path):
    parts, record = export.parts_of(WEIGHTS, WORLD)
    assert parts.keys() == {"clip", "vae", "unet", *judge.NAMES}
    folder = export.export(parts, record, tmp_path / "world", seed=0, command="")
    about = {"world.json", "README.md"}
    wanted = {path.relative_to(WEIGHTS): path.read_bytes() for path in WEIGHTS.rglob("*") if path.is_file()}
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found.keys() == wanted.keys()
    assert [str(path) for path in found if found[path] != wanted[path] and path.name not in about] == []


def test_a_training_can_go_on_from_an_exported_world(tmp_path):
    """Every stage is there but the UNet, which has its rounds behind it; what is there already stays."""
    mine = tmp_path / "vae.safetensors"
    mine.write_bytes(b"mine")
    rounds = train.start(tmp_path, WEIGHTS, WORLD)
    assert rounds == (2400, 1900, 4000) and mine.read_bytes() == b"mine"
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {
        "clip", "vae", "judge", "second_judge", "unet.round1", "unet.round2", "unet.round3"
    }  # fmt: skip
    last = load_file(tmp_path / "unet.round3.safetensors")
    wanted = flatten(load_pipeline("world").unet.params)
    assert last.keys() == wanted.keys()
    assert all(np.array_equal(last[key], wanted[key]) and last[key].dtype == np.float32 for key in wanted)
    assert train.Record(tmp_path).values["unet"]["rounds"] == list(rounds)


def test_what_was_not_exported_is_one_line(tmp_path):
    with pytest.raises(AegisError, match="is no exported world: it has no world.json"):
        export.parts_of(tmp_path, WORLD)


def test_clip_comes_back_with_the_pipelines_text_tower(tmp_path):
    before = clip.load().model
    (tmp_path / "world").mkdir()
    for path in WEIGHTS.iterdir():
        if path.name != "clip":
            (tmp_path / "world" / path.name).symlink_to(path)
    export.save_clip(before, tmp_path / "world" / "clip")
    after = clip.load(tmp_path / "world").model
    assert before.params.keys() == after.params.keys() and "text_model" in after.params
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
