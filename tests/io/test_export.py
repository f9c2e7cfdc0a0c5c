"""Exporting: bit-identical where nothing changed, loadable by diffusers, all or nothing."""

import dataclasses
import json
import os
import pathlib
import shutil
import weakref
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open

from aegis_jax.errors import AegisError
from aegis_jax.io import pipeline, safetensors
from aegis_jax.io.export import save_pipeline
from aegis_jax.io.pipeline import MODELS, load_pipeline
from aegis_jax.models import layout
from aegis_jax.models.model import flatten, unflatten
from tests.io.test_pipeline import VARIETIES
from tests.io.written import as_bytes, changed_unet, files, unet_tensors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["in float32", "in bfloat16"])
@pytest.mark.parametrize("name", VARIETIES)
def test_import_then_export_is_identical_to_the_last_byte(name, dtype, tiny, tmp_path):
    options = VARIETIES[name]
    folder = tiny(**options)
    variant = options.get("variant")
    save_pipeline(load_pipeline(folder, variant=variant, dtype=dtype), tmp_path / "out")
    before, after = files(folder), files(tmp_path / "out")
    assert "README.md" in after and "README.md" not in before
    del after["README.md"]
    if variant:  # a variant's files come out under the plain names; an index names other files then
        before = {key.replace(f".{variant}", ""): path for key, path in before.items()}
    assert sorted(after) == sorted(before)
    for key, path in after.items():
        content, wanted = path.read_bytes(), before[key].read_bytes()
        if variant and ".index" in key:
            content, wanted = json.loads(content), json.loads(wanted.replace(b".fp16", b""))
        assert content == wanted, key


def test_diffusers_loads_an_export_strictly(tiny, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = tiny(sharded=True, dtype="float16", variant="fp16", position_ids=True)
    loaded = load_pipeline(folder, variant="fp16")
    value = np.asarray(loaded.unet.params["conv_in"]["kernel"]) + np.float32(0.25)
    edited = changed_unet(loaded, {"conv_in.kernel": jnp.asarray(value)})
    save_pipeline(edited, tmp_path / "out")
    result = StableDiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    wanted = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16, variant="fp16")
    for component in ("unet", "vae", "text_encoder"):
        ours = getattr(result, component).state_dict()
        theirs = getattr(wanted, component).state_dict()
        assert list(ours) == list(theirs)
        for key in theirs:
            if (component, key) == ("unet", "conv_in.weight"):
                np.testing.assert_array_equal(ours[key].numpy(), value.transpose(3, 2, 0, 1).astype(np.float16))
            else:
                assert as_bytes(ours[key]) == as_bytes(theirs[key]), key
    assert type(result.scheduler) is type(wanted.scheduler)
    text = ["a photo of a red star"]
    assert result.tokenizer(text).input_ids == wanted.tokenizer(text).input_ids


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("chosen", [None, "float32", "float16", "bfloat16"])
def test_changed_tensors_in_the_chosen_type(stored, chosen, tiny, tmp_path):
    folder = tiny(dtype=stored, sharded=True)
    loaded = load_pipeline(folder)
    key, path = "mid_block.attentions.0.proj_in.weight", "mid_block.attentions.0.proj_in.kernel"
    value = np.asarray(flatten(loaded.unet.params)[path]) * np.float32(1.001)
    save_pipeline(changed_unet(loaded, {path: jnp.asarray(value)}), tmp_path / "out", dtype=chosen)
    before, after = unet_tensors(folder), unet_tensors(tmp_path / "out")
    for name, tensor in before.items():
        if name != key:
            assert tensor.dtype == after[name].dtype
            assert as_bytes(tensor) == as_bytes(after[name]), name
    assert after[key].dtype == getattr(torch, chosen or stored)
    rounded = torch.from_numpy(value.transpose(3, 2, 0, 1).copy()).to(after[key].dtype)
    assert as_bytes(after[key]) == as_bytes(rounded)
    assert "1 in unet" in (tmp_path / "out/README.md").read_text()
    # Header order and metadata stay; the index tells the true size.
    index = json.loads((tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    for source in (folder / "unet").glob("*.safetensors"):
        ours = safetensors.read_header(tmp_path / "out/unet" / source.name)
        theirs = safetensors.read_header(source)
        assert list(ours.entries) == list(theirs.entries) and ours.metadata == theirs.metadata
        with safe_open(tmp_path / "out/unet" / source.name, "np") as file:
            assert file.metadata() == {"format": "pt"}


def test_an_edit_survives_the_way_out_and_in(tiny, tmp_path):
    loaded = load_pipeline(tiny(old_vae_names=True, text_prefix=False))
    edits = {}
    for name in MODELS:
        leaves = flatten(getattr(loaded, name).params)
        leaves = {path: leaf + jnp.float32(0.5) for path, leaf in leaves.items()}
        edits[name] = dataclasses.replace(getattr(loaded, name), params=unflatten(leaves))
    save_pipeline(dataclasses.replace(loaded, **edits), tmp_path / "out")
    again = load_pipeline(tmp_path / "out")
    for name in MODELS:
        for path, leaf in flatten(getattr(again, name).params).items():
            np.testing.assert_array_equal(leaf, flatten(edits[name].params)[path])
    assert "208 in unet, 124 in vae, 36 in text_encoder" in (tmp_path / "out/README.md").read_text()


class FreshDrift(Mapping):
    """A drift whose arrays are made anew whenever they are asked for, and counted while they live."""

    def __init__(self, arrays):
        self.arrays, self.live, self.most = arrays, 0, 0

    def __getitem__(self, path):
        array = self.arrays[path].copy()
        self.live += 1
        self.most = max(self.most, self.live)
        weakref.finalize(array, self._gone)
        return array

    def _gone(self):
        self.live -= 1

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


@pytest.mark.parametrize("in_memory", [False, True], ids=["from a folder", "built in memory"])
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_a_drift_is_added_on_the_way_out(stored, held, in_memory, tiny, tmp_path):
    """In float32, to the bits that the source has and not to what loading has left of them."""
    folder = tiny(dtype=stored, sharded=True)
    loaded = load_pipeline(folder, dtype=held)
    loaded = dataclasses.replace(loaded, source=None) if in_memory else loaded
    rng = np.random.default_rng(0)
    leaves = {path: leaf for path, leaf in flatten(loaded.unet.params).items() if path != "conv_in.kernel"}
    drift = FreshDrift({path: rng.standard_normal(leaf.shape, np.float32) * 0.01 for path, leaf in leaves.items()})
    drift.arrays["conv_out.bias"][:] = 0
    save_pipeline(loaded, tmp_path / "out", drift={"unet": drift})
    before, after = unet_tensors(folder), unet_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for path, moved in drift.arrays.items():
        key, axes = layout.torch_key(path), {4: (3, 2, 0, 1), 2: (1, 0)}.get(moved.ndim)
        base = before[key].to(getattr(torch, held)) if in_memory else before[key]
        wanted = base.float() + torch.from_numpy(moved.transpose(axes).copy() if axes else moved)
        assert as_bytes(after[key]) == as_bytes(wanted.to(after[key].dtype)), key
    if not in_memory:
        for key in ("conv_in.weight", "conv_out.bias"):
            assert as_bytes(before[key]) == as_bytes(after[key])
        assert "206 in unet" in (tmp_path / "out/README.md").read_text()
    # Never all of it: one for each thread that works, and for each tensor whose parts are not all written.
    assert drift.live == 0 and drift.most <= 2 * min(os.cpu_count(), 8) + 2 < len(drift) / 10


def test_a_parameter_that_was_changed_since_it_was_loaded_takes_its_drift_as_it_is(tiny, tmp_path):
    folder = tiny(dtype="float16")
    loaded = load_pipeline(folder, dtype="bfloat16")
    edited = changed_unet(loaded, {"conv_in.bias": jnp.full(32, 0.5, jnp.bfloat16)})
    save_pipeline(edited, tmp_path / "out", drift={"unet": {"conv_in.bias": np.full(32, 0.25, np.float32)}})
    assert unet_tensors(tmp_path / "out")["conv_in.bias"].tolist() == [0.75] * 32
    with pytest.raises(AegisError, match="the drift is of another model, which has conv_inn.bias"):
        save_pipeline(edited, tmp_path / "other", drift={"unet": {"conv_inn.bias": np.zeros(32)}})


@pytest.mark.parametrize("in_memory", [False, True], ids=["from a folder", "built in memory"])
def test_a_drift_that_fits_no_tensor_is_refused(in_memory, tiny, tmp_path):
    loaded = load_pipeline(tiny())
    loaded = dataclasses.replace(loaded, source=None) if in_memory else loaded
    for drift, said in (
        ({"unett": {"conv_in.bias": np.zeros(32)}}, "component 'unett': wanted unet, vae, text_encoder"),
        ({"unet": {"conv_in.bias": np.zeros(31)}}, r"conv_in.bias has shape \(31,\), wanted \(32,\)"),
        ({"unet": {"conv_in.bias": np.zeros(())}}, r"conv_in.bias has shape \(\), wanted \(32,\)"),
        ({"unet": {"conv_in.kernel": np.zeros(32)}}, r"conv_in.kernel has shape \(32,\), wanted \(3, 3, 4, 32\)"),
    ):
        with pytest.raises(AegisError, match=said):
            save_pipeline(loaded, tmp_path / "out", drift=drift)
    assert os.listdir(tmp_path) == []


def test_only_the_pipelines_own_files_are_copied(tiny_copy, tmp_path):
    folder = tiny_copy(dtype="float16")
    strays = (
        "README.md logo.png v1-5.ckpt v1-5.safetensors tokenizer/.cache more/config.json "
        "unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.safetensors "
        "unet/diffusion_pytorch_model.non_ema.safetensors text_encoder/pytorch_model.bin "
        "text_encoder/flax_model.msgpack"
    ).split()
    (folder / "more").mkdir()
    for name in strays:
        (folder / name).write_bytes(b"stray")
    (folder / "LICENSE.txt").write_text("the licence")
    save_pipeline(load_pipeline(folder), tmp_path / "out", card="# my card\n")
    after = files(tmp_path / "out")
    assert after["README.md"].read_text() == "# my card\n"
    assert set(after) - {"README.md"} == set(files(folder)) - set(strays)


def test_edited_configs_and_another_tokenizer_are_written(tiny, tmp_path):
    loaded = load_pipeline(tiny())
    loaded.scheduler["steps_offset"] = 0
    loaded.vae.config["scaling_factor"] = 0.5
    other = load_pipeline(tiny(tokenizer="fast"))
    save_pipeline(dataclasses.replace(loaded, tokenizer=other.tokenizer), tmp_path / "out")
    again = load_pipeline(tmp_path / "out")
    assert again.scheduler == loaded.scheduler and again.scheduler["steps_offset"] == 0
    assert again.vae.config == loaded.vae.config
    assert sorted(os.listdir(tmp_path / "out/tokenizer")) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_pipeline_built_in_memory(dtype, tiny, tmp_path):
    from diffusers import StableDiffusionPipeline

    loaded = dataclasses.replace(load_pipeline(tiny()), source=None)
    save_pipeline(loaded, tmp_path / "out", dtype=dtype)
    again = load_pipeline(tmp_path / "out")
    stored = np.dtype(dtype or "float32")
    for name in MODELS:
        for path, leaf in flatten(getattr(loaded, name).params).items():
            wanted = np.asarray(leaf).astype(stored).astype(np.float32)
            np.testing.assert_array_equal(flatten(getattr(again, name).params)[path], wanted)
    reference = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert as_bytes(reference.unet.state_dict()["conv_in.weight"]) == as_bytes(
        unet_tensors(tmp_path / "out")["conv_in.weight"].float()
    )


def test_a_source_that_vanished_or_changed(tiny_copy, tmp_path):
    for name, damage, message in (
        ("unet/diffusion_pytorch_model.safetensors", pathlib.Path.unlink, "does not exist"),
        ("unet/config.json", pathlib.Path.unlink, "vanished since it was loaded"),
        ("tokenizer/vocab.json", lambda path: path.write_text("{}"), "changed since it was loaded"),
    ):
        folder = tiny_copy()
        loaded = load_pipeline(folder)
        damage(folder / name)
        with pytest.raises(AegisError, match=message):
            save_pipeline(loaded, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_not_exported(tiny, tmp_path):
    loaded = load_pipeline(tiny(dtype="float16"))
    huge = changed_unet(loaded, {"conv_in.bias": jnp.full(32, 1e6)})
    with pytest.raises(AegisError, match="'conv_in.bias'.*too large for float16: choose dtype"):
        save_pipeline(huge, tmp_path / "out")
    save_pipeline(huge, tmp_path / "out", dtype="bfloat16")
    assert float(unet_tensors(tmp_path / "out")["conv_in.bias"][0]) == 999424
    broken = changed_unet(loaded, {"conv_in.bias": jnp.full(32, jnp.nan)})
    with pytest.raises(AegisError, match="'conv_in.bias'.*training has diverged"):
        save_pipeline(broken, tmp_path / "nan")
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_parameters_of_another_shape_are_refused(tiny, tmp_path):
    loaded = load_pipeline(tiny())
    for changes in ({"conv_in.bias": jnp.zeros(33)}, {"conv_in.extra": jnp.zeros(1)}):
        with pytest.raises(AegisError, match="unet: 1 parameters are not those of the source"):
            save_pipeline(changed_unet(loaded, changes), tmp_path / "out")


FULL_SIZE = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


@pytest.mark.slow
def test_full_size_round_trip(tiny, tmp_path):
    """The UNet of SD 1.4, 859,520,964 parameters: in, one tensor changed, out; all others equal."""
    folder = shutil.copytree(tiny(), tmp_path / "source")
    config = json.loads((folder / "unet/config.json").read_text()) | FULL_SIZE
    (folder / "unet/config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    text = tiny(text={"hidden_size": 768})
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(text / "text_encoder", folder / "text_encoder")
    leaves = flatten(pipeline.model.abstract(MODELS["unet"], config).params)
    assert sum(leaf.size for leaf in leaves.values()) == 859_520_964
    shapes = {layout.torch_key(p): layout.torch_shape(p, leaf.shape) for p, leaf in leaves.items()}
    entries = [safetensors.Entry(key, "F16", shape) for key, shape in sorted(shapes.items())]

    def part(key, rows):
        rng = np.random.default_rng([*key.encode(), rows.start])
        return rng.standard_normal((rows.stop - rows.start, *shapes[key][1:]), np.float32).astype(np.float16)

    path = folder / "unet/diffusion_pytorch_model.safetensors"
    safetensors.write(
        path,
        entries,
        part,
        metadata={"format": "pt"},
    )
    loaded = load_pipeline(folder, dtype=jnp.bfloat16)
    save_pipeline(loaded, tmp_path / "same")
    same = tmp_path / "same/unet/diffusion_pytorch_model.safetensors"
    with open(path, "rb") as one, open(same, "rb") as two:
        while block := one.read(1 << 26):
            assert block == two.read(1 << 26)
        assert not two.read()
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.kernel"
    edited = changed_unet(loaded, {name: flatten(loaded.unet.params)[name] * 2})
    save_pipeline(edited, tmp_path / "edited", dtype="float32")
    ours = tmp_path / "edited/unet/diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as source, safe_open(ours, "pt") as result:
        assert sorted(source.keys()) == sorted(result.keys())
        for key in source.keys():
            before, after = source.get_tensor(key), result.get_tensor(key)
            if key == layout.torch_key(name):
                assert after.dtype == torch.float32
                assert torch.equal(after, (before.to(torch.bfloat16) * 2).float())
            else:
                assert before.dtype == after.dtype and as_bytes(before) == as_bytes(after)
