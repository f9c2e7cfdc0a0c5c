"""Trainable sets against the tensor names of diffusers' file."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from aegis_jax.erasure import groups, trainable
from aegis_jax.models.layout import torch_key
from aegis_jax.models.model import flatten

# By the names in a diffusers file; noxattn is ESD's: nor what every prompt passes through at the network's two ends.
WANTED = {
    "full": lambda key: True,
    "xattn": lambda key: "attn2" in key,
    "kv": lambda key: "attn2.to_k" in key or "attn2.to_v" in key,
    "noxattn": lambda key: not any(part in key for part in ("attn2", "time_embedding", "conv_norm_out", "conv_out")),
}


@pytest.mark.parametrize("name", WANTED)
def test_selects_by_diffusers_names(pipeline, folder, name):
    file = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    ours = {torch_key(path) for path in trainable.select(pipeline.unet.params, name)}
    assert ours == {key for key in file if WANTED[name](key)}
    assert ours


@pytest.mark.parametrize("name", WANTED)
def test_drift_is_added_to_its_tensor_and_to_no_other(pipeline, name):
    params = pipeline.unet.params
    chosen = trainable.select(params, name)
    rng = np.random.default_rng(0)
    drift = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in chosen.items()}
    moved = flatten(trainable.add_drift(params, groups.stack(drift), name))
    for path, leaf in flatten(params).items():
        if path in drift:
            np.testing.assert_array_equal(moved[path], np.asarray(leaf) + drift[path])
        else:
            assert moved[path] is leaf  # the same array: it exists once in memory


def test_drift_starts_at_zero(pipeline):
    drift = trainable.zero_drift(pipeline.unet.params, "xattn")
    chosen = trainable.select(pipeline.unet.params, "xattn")
    assert sum(d.size for d in drift.values()) == sum(leaf.size for leaf in chosen.values())
    assert not any(np.asarray(d).any() for d in drift.values())


def test_drift_by_path_is_made_when_asked_for(pipeline):
    params = pipeline.unet.params
    zero = trainable.zero_drift(params, "xattn")
    drift = {name: x + np.arange(x.size, dtype=np.float32).reshape(x.shape) for name, x in zero.items()}
    wanted = groups.unstack(drift, like=trainable.select(params, "xattn"))
    found = trainable.drift_by_path(params, drift, "xattn")
    assert sorted(found) == sorted(wanted) and len(found) == len(wanted)
    for path, array in wanted.items():
        np.testing.assert_array_equal(found[path], array)
        assert found[path] is not found[path]
