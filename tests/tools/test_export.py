"""Exporting the shipped world's own parameters gives the shipped files again."""

import jax
import numpy as np
import pytest

from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.world import WEIGHTS, clip, judge
from tools.world import export

pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")


def test_the_shipped_world_comes_back(tmp_path):
    pipeline = load_pipeline("world")
    parts = {"unet": pipeline.unet.params, "vae": pipeline.vae.params, "clip": clip.load().model.params}
    parts |= {name: judge.load(name).model.params for name in judge.NAMES}
    record = {"unet": {"scaling_factor": pipeline.vae.config["scaling_factor"]}}
    folder = export.export(parts, record, tmp_path / "world", seed=0, command="")
    about = {"world.json", "README.md"}
    wanted = {path.relative_to(WEIGHTS): path.read_bytes() for path in WEIGHTS.rglob("*") if path.is_file()}
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found.keys() == wanted.keys()
    assert [str(path) for path in found if found[path] != wanted[path] and path.name not in about] == []


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
