"""run/manifest.py: a fingerprint that tells any two pipelines apart, and nothing else."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest

import aegis_jax
from aegis_jax.run import manifest


@pytest.fixture
def pipeline(folder):
    return aegis_jax.load_pipeline(folder)


def test_the_same_weights_elsewhere_have_the_same_fingerprint(pipeline, folder, tmp_path):
    copy = aegis_jax.load_pipeline(shutil.copytree(folder, tmp_path / "copy"))
    assert manifest.fingerprint(copy) == manifest.fingerprint(pipeline)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_one_changed_weight_is_noticed(pipeline, name):
    model = getattr(pipeline, name)
    leaves, tree = jax.tree.flatten(model.params)
    leaves[-1] = leaves[-1] + jnp.float32(1e-3)
    changed = dataclasses.replace(model, params=jax.tree.unflatten(tree, leaves))
    other = dataclasses.replace(pipeline, **{name: changed})
    assert manifest.fingerprint(other) != manifest.fingerprint(pipeline)


def test_another_schedule_is_noticed(pipeline):
    other = dataclasses.replace(pipeline, scheduler={**pipeline.scheduler, "beta_end": 0.02})
    assert manifest.fingerprint(other) != manifest.fingerprint(pipeline)
