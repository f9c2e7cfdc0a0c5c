"""Delta files: what they make of their base is the full export, and nothing else is taken for a base."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import aegis_jax
from aegis_jax import AegisError, apply_delta, load_pipeline, save_pipeline, write_delta
from aegis_jax.cli import main
from aegis_jax.io.delta import base_hashes
from aegis_jax.io.delta_apply import command, write_applied
from aegis_jax.io.delta_write import write_drift
from aegis_jax.io.lora import write_lora
from aegis_jax.models.model import flatten, unflatten
from tests.io.written import unet_tensors

DOCUMENT = pathlib.Path(aegis_jax.__file__).parent.parent / "docs/delta.md"
UNET = "unet/diffusion_pytorch_model.safetensors"
VARIETIES = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "sharded": {"sharded": True, "dtype": "bfloat16"},
    "sharded variant": {"dtype": "float16", "variant": "fp16", "sharded": True},
    "old VAE names, safety checker": {"old_vae_names": True, "safety_checker": True, "position_ids": True},
}


def drift(pipeline):
    """What an erasure of keys and values adds."""
    random = np.random.default_rng(0)
    leaves = {k: x for k, x in flatten(pipeline.unet.params).items() if ".attn2.to_k" in k or ".attn2.to_v" in k}
    return {k: jnp.asarray(0.01 * random.standard_normal(x.shape), jnp.float32) for k, x in leaves.items()}


@pytest.fixture(scope="module")
def erased(tiny, tmp_path_factory):
    """erased(**options) -> (base, full export, delta file); to be read only."""
    made = {}

    def make(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            base, out, variant = tiny(**options), tmp_path_factory.mktemp("erased"), options.get("variant")
            loaded = load_pipeline(base, variant=variant)
            save_pipeline(loaded, out / "full", drift={"unet": drift(loaded)}, card="# Without stars\r\n")
            write_delta(out / "full", base, out / "delta.safetensors", variant=variant)
            made[key] = base, out / "full", out / "delta.safetensors"
        return made[key]

    return make


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", VARIETIES)
def test_applied_it_is_the_full_export_to_the_last_byte(name, erased, tmp_path):
    options = VARIETIES[name]
    base, full, delta = erased(**options)
    write_applied(delta, base, tmp_path / "out", variant=options.get("variant"))
    assert contents(tmp_path / "out") == contents(full)
    saved = apply_delta(load_pipeline(base, variant=options.get("variant")), delta)
    save_pipeline(saved, tmp_path / "saved", card="# Without stars\r\n")
    assert contents(tmp_path / "saved") == contents(full)


@pytest.mark.parametrize("name", ["float32", "float16", "sharded variant"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_a_drift_it_is_what_the_full_export_gives(name, dtype, erased, tmp_path):
    """Without the export between, and also where the drift is too small for one of the tensors' type."""
    variant, (base, _, _) = VARIETIES[name].get("variant"), erased(**VARIETIES[name])
    loaded = load_pipeline(base, variant=variant, dtype=dtype)
    moves = drift(loaded)
    moves[max(moves)] *= 1e-30
    about = {"concepts": '["梵高"]', "method": "paper"}
    save_pipeline(loaded, tmp_path / "full", drift={"unet": moves}, card="# Without\r\n")
    count = write_delta(tmp_path / "full", base, tmp_path / "full.safetensors", variant=variant, about=about)
    hashes = base_hashes(loaded.source.folder)
    more = {"card": "# Without\r\n", "base": base.name, "hashes": hashes, "about": about}
    assert write_drift(loaded, {"unet": moves}, tmp_path / "delta.safetensors", **more) == count < len(moves)
    assert (tmp_path / "delta.safetensors").read_bytes() == (tmp_path / "full.safetensors").read_bytes()
    none = {path: 0 * move for path, move in moves.items()}
    with pytest.raises(AegisError, match="changed nothing"):
        write_drift(loaded, {"unet": none}, tmp_path / "none.safetensors", **more)


def test_it_holds_what_differs_and_no_more(erased):
    base, full, delta = erased(dtype="float16")
    before, after, held = unet_tensors(base), unet_tensors(full), load_file(delta)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert held.keys() == changed and len(changed) > 2
    assert all(held[key].dtype == torch.float16 and torch.equal(held[key], after[key]) for key in held)
    with safe_open(delta, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["aegis_delta"] == "1" and metadata["base"] == base.name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["in float32", "in bfloat16"])
def test_in_memory_it_is_what_the_full_export_loads_as(dtype, erased):
    base, full, delta = erased(dtype="float16")
    ours, wanted = apply_delta(load_pipeline(base, dtype=dtype), delta), load_pipeline(full, dtype=dtype)
    for path, leaf in flatten(wanted.unet.params).items():
        np.testing.assert_array_equal(np.asarray(flatten(ours.unet.params)[path]), np.asarray(leaf), strict=True)


def lines_of_pytorch(pipe, path):
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
    exec(code, {"pipe": pipe, "path": path})  # noqa: S102


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}], ids=["float32", "float16"])
def test_the_documents_lines_of_pytorch(options, erased, tiny):
    from diffusers import UNet2DConditionModel

    def pytorch(folder, dtype=None):
        dtype = dtype or getattr(torch, options.get("dtype", "float32"))
        return types.SimpleNamespace(
            unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
        )

    base, full, delta = erased(**options)
    ours, wanted = pytorch(base), pytorch(full).unet.state_dict()
    lines_of_pytorch(ours, delta)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in ours.unet.state_dict().items())
    for other in (ours, pytorch(tiny(seed=3, **options)), pytorch(base, torch.bfloat16)):
        before = {key: tensor.clone() for key, tensor in other.unet.state_dict().items()}
        with pytest.raises(ValueError, match="made for another base model"):
            lines_of_pytorch(other, delta)
        assert all(torch.equal(tensor, before[key]) for key, tensor in other.unet.state_dict().items())


def test_what_diffusers_wrote_is_compared_by_what_it_says(tiny, tmp_path):
    """Another tool's folder: all defaults in its configs, the VAE's new names, no safety checker, other shards."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    base = tiny(old_vae_names=True, safety_checker=True, position_ids=True, text_prefix=False, dtype="float16")
    theirs = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, torch_dtype=torch.float16)
    theirs.scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    theirs.unet.conv_out.bias.data += 1
    theirs.save_pretrained(tmp_path / "esd", max_shard_size="400kB")
    with pytest.warns(UserWarning, match="has no safety_checker"):
        assert write_delta(tmp_path / "esd", base, tmp_path / "esd.safetensors") == 1
    write_applied(tmp_path / "esd.safetensors", base, tmp_path / "out")
    ours = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None, torch_dtype=torch.float16)
    for name in ("unet", "vae", "text_encoder"):
        wanted = getattr(theirs, name).state_dict()
        assert all(torch.equal(x, wanted[key]) for key, x in getattr(ours, name).state_dict().items())


def edited(file, change):
    """Passes the tensors and metadata of a file through `change`."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def first(tensors):
    return min(key for key in tensors if key.endswith("weight"))


def other_value(tensors, metadata):
    tensors[first(tensors)][0] += 1


def other_shape(tensors, metadata):
    tensors[first(tensors)] = tensors[first(tensors)][:-1].clone()


def other_type(tensors, metadata):
    tensors[first(tensors)] = tensors[first(tensors)].to(torch.float16)


def renamed(tensors, metadata):
    tensors["conv_on.weight"] = tensors.pop(first(tensors))


DAMAGES = {
    "value": (other_value, "is damaged, its tensors are not those it was written with"),
    "shape": (other_shape, r"unet: '.*' has shape \(31, 32\) in .* and \(32, 32\) in "),
    "type": (other_type, "unet: '.*' is F16 in .* and F32 in .*same precision, e.g. by --variant fp16"),
    "key": (renamed, "unet: 'conv_on.weight' is in .* but not in "),
    "fewer": (lambda tensors, metadata: tensors.pop(first(tensors)), "made for another base model"),
    "foreign": (lambda tensors, metadata: metadata.pop("aegis_delta"), "is no delta file: its metadata lack"),
    "newer": (lambda tensors, metadata: metadata.update(aegis_delta="3"), "of version '3', known is 2"),
    "hash": (lambda tensors, metadata: metadata.pop("text_sha256"), "without text_sha256 in its metadata"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_file(name, erased, tmp_path):
    change, message = DAMAGES[name]
    base, _, delta = erased()
    shutil.copy(delta, tmp_path / "delta.safetensors")
    edited(tmp_path / "delta.safetensors", change)
    refused(tmp_path / "delta.safetensors", base, tmp_path, message)


def refused(delta, base, tmp_path, message):
    """Both ways refuse in one line, and nothing is written."""
    with pytest.raises(AegisError, match=message) as raised:
        write_applied(delta, base, tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
    with pytest.raises(AegisError, match=message):
        apply_delta(base, delta)


def test_other_formats(erased, tmp_path):
    base, full, delta = erased()
    (tmp_path / "short.safetensors").write_bytes(delta.read_bytes()[:-100])
    refused(tmp_path / "short.safetensors", base, tmp_path, "the file is truncated or damaged")
    torch.save({"conv_in.weight": torch.ones(1)}, tmp_path / "delta.safetensors")
    refused(tmp_path / "delta.safetensors", base, tmp_path, "is a PyTorch pickle under a safetensors name")
    torch.save({"conv_in.weight": torch.ones(1)}, tmp_path / "delta.pt")
    refused(tmp_path / "delta.pt", base, tmp_path, "is a pickle, which can run code")
    refused(full / UNET, base, tmp_path, "is no delta file")
    refused(tmp_path / "none.safetensors", base, tmp_path, "does not exist")
    refused(full, base, tmp_path, "cannot read")


def copied(base, tmp_path, file, change):
    folder = shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
    edited(folder / file, change)
    return folder


def test_a_wrong_base(erased, tiny, tmp_path, capsys):
    base, full, delta = erased()
    refused(delta, full, tmp_path, "made for another base model than .*: the tensors that it replaces differ")
    refused(delta, tiny(seed=3), tmp_path, "made for another base model .*the tensors that it replaces differ")
    refused(delta, tiny(dtype="float16"), tmp_path, "is F32 in .* and F16 in")
    other = copied(base, tmp_path, UNET, other_value)  # a convolution, which the delta leaves alone
    refused(delta, other, tmp_path, "other tensors of the UNet differ")
    assert main(["apply", str(delta), "--model", str(other), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("aegis: error: ") and printed.count("\n") == 1 and not (tmp_path / "out").exists()


def test_another_text_encoder(erased, tmp_path):
    base, full, delta = erased()
    other = copied(base, tmp_path, "text_encoder/model.safetensors", other_value)
    refused(delta, other, tmp_path, "its text encoder is another")


def test_with_the_text_encoder(tiny, tmp_path, capsys):
    """Of what AdvUnlearn trains: the file holds those tensors, under PyTorch's names, and gives the full export."""
    base = tiny(text_prefix=False, dtype="float16")  # whose files leave out a part of the names
    loaded = load_pipeline(base)
    random = np.random.default_rng(0)
    params = flatten(loaded.text_encoder.params)
    moves = {k: 0.01 * random.standard_normal(x.shape).astype(np.float32) for k, x in params.items() if "mlp" in k}
    both = {"unet": drift(loaded), "text_encoder": moves}
    about = {"concepts": '["star"]'}
    more = {"card": "# Without", "base": base.name, "hashes": base_hashes(loaded.source.folder), "about": about}
    for name, changed in {"both": both, "text": {"text_encoder": moves}}.items():
        delta, full = tmp_path / f"{name}.safetensors", tmp_path / name
        save_pipeline(loaded, full, drift=changed, card="# Without")
        count = write_delta(full, base, delta, about=about)
        assert count == sum(map(len, changed.values())) == write_drift(loaded, changed, tmp_path / "again", **more)
        assert (tmp_path / "again").read_bytes() == delta.read_bytes()
        (tmp_path / "again").unlink()
        assert all(key.startswith("text_model.encoder.") for key in load_file(delta).keys() - unet_tensors(base).keys())
        write_applied(delta, base, tmp_path / "out", overwrite=True)
        assert contents(tmp_path / "out") == contents(full)
        ours, wanted = apply_delta(base, delta), load_pipeline(full)
        for component in ("unet", "text_encoder"):
            one, other = (flatten(getattr(p, component).params) for p in (ours, wanted))
            assert all(np.array_equal(one[path], leaf) for path, leaf in other.items())
    refused(delta, full, tmp_path / "none", "the tensors that it replaces differ")
    edited(delta, other_value)
    refused(delta, base, tmp_path / "none", "is damaged")
    assert main(["compose", str(tmp_path / "both.safetensors"), str(delta), "--base", str(base), "--out", "x"]) == 2
    assert "changes the text encoder" in capsys.readouterr().err


def configured(folder, file, **values):
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def test_what_a_delta_cannot_carry(erased, tiny, tmp_path):
    base, full, _ = erased()
    out = tmp_path / "delta.safetensors"

    def refuse(message, change):
        folder = shutil.copytree(full, tmp_path / "pipeline")
        change(folder)
        with pytest.raises(AegisError, match=message) as raised:
            write_delta(folder, base, out)
        assert "\n" not in str(raised.value) and not out.exists()
        shutil.rmtree(folder)

    refuse("the vae of", lambda x: edited(x / "vae/diffusion_pytorch_model.safetensors", other_value))
    refuse("vae: '.*' is F16", lambda x: edited(x / "vae/diffusion_pytorch_model.safetensors", other_type))
    refuse("unet: '.*' is in", lambda x: edited(x / UNET, lambda t, m: t.update(extra=torch.ones(1))))
    refuse("unet: norm_eps is", lambda x: configured(x, "unet/config.json", norm_eps=1e-3))
    sigmas = {"prediction_type": "v_prediction"}
    refuse("prediction_type", lambda x: configured(x, "scheduler/scheduler_config.json", **sigmas))
    refuse("tokenizer/vocab.json", lambda x: configured(x, "tokenizer/vocab.json", new=1))
    with pytest.raises(AegisError, match="there is nothing to write"):
        write_delta(base, base, out)
    with pytest.raises(AegisError, match="has a feature_extractor, its base .* has none"):
        write_delta(tiny(safety_checker=True), base, out)
    assert not out.exists()


def test_nothing_is_overwritten_unasked(erased, tmp_path):
    base, full, delta = erased()
    out, folder = shutil.copy(delta, tmp_path / "delta.safetensors"), shutil.copytree(base, tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(AegisError, match="exists: choose another file or allow overwriting it"):
        write_delta(full, base, out)
    with pytest.raises(AegisError, match="exists: choose another folder"):
        write_applied(delta, base, folder)
    with pytest.raises(AegisError, match="is a folder: name a file"):
        write_delta(full, base, folder, overwrite=True)
    with pytest.raises(AegisError, match="is no delta file, so it is not overwritten"):
        write_delta(full, base, folder / UNET, overwrite=True)
    assert contents(tmp_path) == before
    edited(pathlib.Path(out), lambda tensors, metadata: metadata.pop("card"))
    write_delta(full, base, out, overwrite=True)
    write_applied(out, folder, folder, overwrite=True)
    assert pathlib.Path(out).read_bytes() == delta.read_bytes() and contents(folder) == contents(full)


def test_a_delta_in_the_folder_to_be_replaced_is_not_lost(erased, tmp_path):
    base, full, delta = erased()
    folder = shutil.copytree(base, tmp_path / "out")
    inside = shutil.copy(delta, folder / "delta.safetensors")
    before = contents(folder)
    with pytest.raises(AegisError, match="would be replaced: move it"):
        write_applied(inside, base, folder, overwrite=True)
    assert contents(folder) == before


def test_a_base_in_the_folder_to_be_replaced_is_not_lost(erased, tiny, tmp_path):
    base, _, delta = erased()
    outer = shutil.copytree(tiny(seed=3), tmp_path / "models")
    inner = shutil.copytree(base, outer / "base")
    before = contents(outer)
    with pytest.raises(AegisError, match="the model .*base lies inside .*models, which would be replaced"):
        write_applied(delta, inner, outer, overwrite=True)
    assert contents(outer) == before


def test_a_tokenizer_that_was_called_before_it_was_saved_is_the_same(tiny, tmp_path):
    from transformers import CLIPTokenizer

    base = tiny(tokenizer="fast")
    loaded, full = load_pipeline(base), tmp_path / "full"
    save_pipeline(loaded, full, drift={"unet": drift(loaded)})
    theirs = CLIPTokenizer.from_pretrained(base / "tokenizer")
    theirs(["a star"], padding="max_length", truncation=True, max_length=77)
    theirs.save_pretrained(full / "tokenizer")
    file = full / "tokenizer/tokenizer.json"
    assert json.loads(file.read_text())["truncation"] != json.loads((base / "tokenizer/tokenizer.json").read_text())
    assert write_delta(full, base, tmp_path / "delta.safetensors")
    configured(full, "tokenizer/tokenizer.json", normalizer=None)
    with pytest.raises(AegisError, match="tokenizer.json is one"):
        write_delta(full, base, tmp_path / "other.safetensors")


def test_a_sample_size_that_was_understood_and_written_out_is_the_same(erased, tmp_path):
    """Before diffusers 0.9 less than 64 means 64, and saving writes that."""
    base, full, _ = erased()
    old, new = shutil.copytree(base, tmp_path / "old"), shutil.copytree(full, tmp_path / "new")
    configured(old, "unet/config.json", sample_size=32, _diffusers_version="0.6.0")
    configured(new, "unet/config.json", sample_size=64)
    assert write_delta(new, old, tmp_path / "delta.safetensors")
    configured(old, "unet/config.json", _diffusers_version="0.9.0")
    with pytest.raises(AegisError, match="unet: sample_size is"):
        write_delta(new, old, tmp_path / "other.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_written_nor_applied(bad, erased, tmp_path, monkeypatch):
    base, full, delta = erased(dtype="float16")
    broken, out = shutil.copytree(full, tmp_path / "broken"), tmp_path / "delta.safetensors"
    key = min(load_file(delta))

    def broke(tensors, metadata):
        tensors[key][0, 0] = bad

    edited(broken / UNET, broke)
    with pytest.raises(AegisError, match=f"broken: unet's '{key}' has values that are not finite"):
        write_delta(broken, base, out)
    assert not out.exists()
    with monkeypatch.context() as patch:  # as an earlier version wrote it
        patch.setattr("aegis_jax.io.delta.check_finite", lambda *given: None)
        write_delta(broken, base, out)
    refused(out, base, tmp_path, f"delta.safetensors: unet's '{key}' has values that are not finite")


def test_a_pickles_suffix_is_refused_before_anything_is_read(erased, tmp_path):
    base, full, _ = erased()
    with pytest.raises(AegisError, match="x.bin has a pickle's suffix.*name it x.safetensors"):
        write_delta(tmp_path / "none", base, tmp_path / "x.bin")


def test_sigterm_leaves_nothing_of_a_file(erased, tmp_path, monkeypatch):
    base, full, delta = erased()
    for write in (write_delta, lambda *given: write_lora(delta, base, given[2], rank=1)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(KeyboardInterrupt, match="SIGTERM while writing .*x.safetensors: nothing was kept"):
                write(full, base, tmp_path / "x.safetensors")
        assert os.listdir(tmp_path) == [] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_result_that_was_saved_under_its_variants_name_alone(erased, tmp_path):
    base, full, delta = erased()
    mine = shutil.copytree(full, tmp_path / "mine")
    for file in list(mine.glob("*/*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    write_delta(mine, base, tmp_path / "delta.safetensors")
    assert (tmp_path / "delta.safetensors").read_bytes() == delta.read_bytes()
    shutil.copy(next(mine.glob("unet/*.safetensors")), mine / "unet/diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(AegisError, match="mine/text_encoder has weights of variant fp16 only"):
        write_delta(mine, base, tmp_path / "other.safetensors")


def test_a_setting_that_only_one_config_states(erased, tmp_path):
    base, full, delta = erased()
    for component, key, default, other in (
        ("vae", "scaling_factor", 0.18215, 0.5),
        ("text_encoder", "hidden_act", "quick_gelu", "gelu"),
    ):
        mine = shutil.copytree(full, tmp_path / component)
        file = mine / component / "config.json"
        config = json.loads(file.read_text())
        silent = shutil.copytree(base, tmp_path / f"{component}, silent")
        stated = json.loads((silent / component / "config.json").read_text())
        assert stated.pop(key) == default
        (silent / component / "config.json").write_text(json.dumps(stated))
        write_delta(mine, silent, tmp_path / f"{component}.safetensors")
        file.write_text(json.dumps(config | {key: other}))
        with pytest.raises(AegisError, match=f"{component}: {key} is"):
            write_delta(mine, silent, tmp_path / "none.safetensors")


def test_a_full_disk_leaves_nothing(erased, tmp_path, monkeypatch):
    base, full, delta = erased()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(AegisError, match="no space left"):
        write_applied(delta, base, tmp_path / "out")
    with pytest.raises(AegisError, match="no space left"):
        write_delta(full, base, tmp_path / "delta.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_that_was_changed_since(erased):
    base, _, delta = erased()
    once = apply_delta(base, delta)
    with pytest.raises(AegisError, match="was changed since the pipeline was loaded"):
        apply_delta(once, delta)
    with pytest.raises(AegisError, match="built in memory"):
        apply_delta(dataclasses.replace(once, source=None), delta)
    loaded = load_pipeline(base)
    bias = {"conv_out.bias": flatten(loaded.unet.params)["conv_out.bias"] + 1}  # no tensor of the delta
    unet = dataclasses.replace(loaded.unet, params=unflatten(flatten(loaded.unet.params) | bias))
    ours = apply_delta(dataclasses.replace(loaded, unet=unet), delta)
    np.testing.assert_array_equal(flatten(ours.unet.params)["conv_out.bias"], bias["conv_out.bias"])


def test_a_path_that_is_none(erased):
    base, full, _ = erased()
    for path in ("a\0b", "~nobody-of-that-name/x"):
        with pytest.raises(AegisError, match="is not a path|no such home folder"):
            write_delta(full, base, path)


def test_the_command_that_applies_has_all_that_the_base_needs():
    assert command("a b.safetensors", "me/sd") == "aegis apply 'a b.safetensors' --model me/sd --out DIR"
    assert command("x", "me/sd", "v1", "fp16") == "aegis apply x --model me/sd --revision v1 --variant fp16 --out DIR"
    assert command("x", "me/sd", "", "") == "aegis apply x --model me/sd --out DIR"
