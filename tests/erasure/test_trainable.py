"""Trainable sets against the tensor names of diffusers' file."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from aegis_jax.erasure import groups, trainable
from aegis_jax.erasure.aegis.config import EraseConfig
from aegis_jax.erasure.aegis.setup import freeze
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


def test_layers_are_torchs_linears_and_convolutions(pipeline, folder):
    """As ESD's code of 2025 selects them: by the kind of the module, outside attn2."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    kinds = torch.nn.Linear, torch.nn.Conv2d
    modules = [(name, module) for name, module in unet.named_modules() if isinstance(module, kinds)]
    wanted = {f"{name}.{key}" for name, m in modules if "attn2" not in name for key, _ in m.named_parameters()}
    assert {torch_key(path) for path in trainable.select(pipeline.unet.params, "layers")} == wanted


def test_the_text_encoders_set_is_all_but_its_embeddings(pipeline, folder):
    file = load_file(folder / "text_encoder" / "model.safetensors")
    ours = {torch_key(path) for path in trainable.select(pipeline.text_encoder.params, "text_encoder")}
    assert ours == {key for key in file if "embedding" not in key} and len(ours) > 10
    assert not trainable.select(pipeline.unet.params, "text_encoder")


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


def test_a_step_smaller_than_the_rounding_is_not_lost(pipeline, folder):
    """theta0 computed in bfloat16: theta is the file's float32 tensor plus the drift, rounded once."""
    frozen = freeze(pipeline, ["star"], EraseConfig(trainable="kv", compute_dtype="bfloat16"))
    chosen = trainable.select(pipeline.unet.params, "kv")
    rng = np.random.default_rng(0)
    small = {path: (1e-4 * rng.normal(size=leaf.shape)).astype(np.float32) for path, leaf in chosen.items()}
    theta = trainable.add_drift(frozen.unet, groups.stack(small), "kv", frozen.low_bits)
    file = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    changed = 0
    for path, leaf in trainable.select(theta, "kv").items():
        exact = file[torch_key(path)].T
        wanted = jnp.asarray(exact + small[path]).astype(jnp.bfloat16)
        assert leaf.dtype == jnp.bfloat16 and leaf.tobytes() == wanted.tobytes()
        changed += int((leaf != jnp.asarray(exact).astype(jnp.bfloat16)).sum())
    assert changed > 10
    assert freeze(pipeline, ["star"], EraseConfig(compute_dtype="float32")).low_bits == {}


def test_theta0_with_its_low_bits_is_its_float32():
    """All bits but those of one tie in two, of numbers of every size and sign, and of float16's, many of them ties."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 10**6, np.uint32).view(np.float32)
    halves = rng.integers(0, 2**16, 10**5).astype(np.uint16).view(np.float16).astype(np.float32)
    exact = np.concatenate([bits, halves, np.float32([0.0, -0.0, 1e-40, -1e-45, 3.38e38])])
    exact = exact[np.abs(exact) < 3.39e38]  # what rounds to infinity, and NaN, is no weight
    rounded = {"block": {"kernel": jnp.asarray(exact).astype(jnp.bfloat16)}}
    low = trainable.low_bits({"block": {"kernel": jnp.asarray(exact)}}, "full", jnp.bfloat16)
    assert {x.dtype for x in low.values()} == {jnp.dtype(jnp.int16)}
    found = np.asarray(trainable._in_float32(rounded["block"]["kernel"], low["block.kernel"]))
    short = exact.view(np.int32) - found.view(np.int32)
    down = exact.view(np.uint32) & 0x1FFFF == 0x08000  # a tie whose even neighbour lies towards 0
    assert set(short[down]) == {1} and down.sum() > 100 and not short[~down].any()
    drift = groups.stack({"block.kernel": jnp.zeros(exact.shape, jnp.float32)})
    theta = np.asarray(trainable.add_drift(rounded, drift, "full", low)["block"]["kernel"])
    normal = np.abs(exact) >= 2**-126  # XLA's sums take what is smaller for 0
    assert (theta == np.asarray(rounded["block"]["kernel"]))[normal].all()


def test_the_effective_drift_is_the_drift():
    """One Adam step of 1e-5 on weights of 0.5 to 1 is 1/195 of bfloat16's spacing there: added to rounded weights it
    would change nothing; added before the rounding it moves one weight in 195, so that the mean moves by 1e-5."""
    exact = np.linspace(0.5, 1, 2**20, endpoint=False, dtype=np.float32)
    params = {"block": {"kernel": jnp.asarray(exact).astype(jnp.bfloat16)}}
    low = trainable.low_bits({"block": {"kernel": exact}}, "full", jnp.bfloat16)
    for size in (1e-5, -1e-5, 1e-3):
        drift = groups.stack({"block.kernel": jnp.full(exact.shape, size, jnp.float32)})

        def effect(*given, drift=drift):
            theta = trainable.add_drift(params, drift, "full", *given)["block"]["kernel"]
            return np.mean(np.asarray(theta, np.float64) - np.asarray(params["block"]["kernel"], np.float64))

        np.testing.assert_allclose(effect(low), size, 0.01)
        assert effect() == 0  # half of the spacing is 1.95e-3: what this test is here to tell apart
