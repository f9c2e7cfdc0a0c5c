"""Loading pipelines: every tensor against the file, every variety of folder, memory."""

import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.torch import load_file

from aegis_jax.errors import AegisError
from aegis_jax.io import convert, safetensors
from aegis_jax.io.export import save_pipeline
from aegis_jax.io.pipeline import MODELS, load_pipeline
from aegis_jax.models import layout, model
from aegis_jax.models.model import flatten
from tests.tiny import rename_tensors

ROOT = pathlib.Path(__file__).parents[2]


def torch_tensors(folder, component):
    """Every tensor of a component by its key in today's PyTorch naming."""
    merged = {}
    for path in sorted((folder / component).glob("*.safetensors")):
        merged |= load_file(path)
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    if component == "vae":
        for old, new in names.items():
            merged = {
                key.replace(f".{old}.", f".{new}.") if ".attentions." in key else key: value
                for key, value in merged.items()
            }
    if component == "text_encoder":
        merged = {
            "text_model." + key.removeprefix("text_model."): value
            for key, value in merged.items()
            if not key.endswith("position_ids")
        }
    return merged


def assert_loaded(pipeline, folder):
    for name in MODELS:
        leaves = flatten(getattr(pipeline, name).params)
        wanted = torch_tensors(folder, name)
        assert sorted(layout.torch_key(path) for path in leaves) == sorted(wanted)
        for path, leaf in leaves.items():
            tensor = wanted[layout.torch_key(path)].float().numpy()
            # Written out here, independent of convert: PyTorch's OIHW and (out, in).
            kernel = path.endswith(".kernel")
            axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(leaf.ndim) if kernel else None
            tensor = tensor.transpose(axes) if axes else tensor
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(np.asarray(leaf), tensor, err_msg=path)


VARIETIES = {
    "SD 1.x": {},
    "SD 2.x": {"v_prediction": True},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16", "seed": 1},
    "sharded": {"sharded": True},
    "variant": {"dtype": "float16", "variant": "fp16"},
    "sharded variant": {"dtype": "float16", "variant": "fp16", "sharded": True},
    "old VAE names": {"old_vae_names": True},
    "old VAE names, sharded": {"old_vae_names": True, "sharded": True},
    "no text_model.": {"text_prefix": False, "position_ids": True},
    "position_ids": {"position_ids": True},
    "tokenizer.json": {"tokenizer": "fast", "v_prediction": True},
    "safety checker": {"safety_checker": True},
}


@pytest.mark.parametrize("name", VARIETIES)
def test_every_tensor_arrives(name, tiny):
    options = VARIETIES[name]
    folder = tiny(**options)
    pipeline = load_pipeline(folder, variant=options.get("variant"))
    assert_loaded(pipeline, folder)
    assert pipeline.unet.config == json.loads((folder / "unet/config.json").read_text())
    assert pipeline.scheduler == json.loads((folder / "scheduler/scheduler_config.json").read_text())


def test_old_vae_attention_as_convolutions(tiny_copy):
    folder = tiny_copy(old_vae_names=True)
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    from safetensors.torch import save_file

    wide = {
        key: value[:, :, None, None].clone() if ".query.w" in key or ".proj_attn.w" in key else value
        for key, value in load_file(path).items()
    }
    save_file(wide, path, {"format": "pt"})
    loaded = flatten(load_pipeline(folder).vae.params)
    kernel = loaded["decoder.mid_block.attentions.0.to_q.kernel"]
    wanted = wide["decoder.mid_block.attentions.0.query.weight"][:, :, 0, 0].numpy().T
    np.testing.assert_array_equal(np.asarray(kernel), wanted)


def test_todays_names_must_have_todays_shapes(tiny_copy):
    from safetensors.torch import save_file

    folder = tiny_copy()
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    key = "decoder.mid_block.attentions.0.to_q.weight"
    tensors = load_file(path)
    save_file({**tensors, key: tensors[key][:, :, None, None].clone()}, path, {"format": "pt"})
    with pytest.raises(AegisError, match=r"to_q.weight' has shape \(64, 64, 1, 1\), wanted \(64, 64\)"):
        load_pipeline(folder)


def test_parameters_in_another_dtype(tiny):
    folder = tiny(sharded=True)
    wanted = torch_tensors(folder, "unet")["conv_in.weight"].numpy().transpose(2, 3, 1, 0)
    for dtype, rounded in (
        (jnp.bfloat16, wanted.astype(ml_dtypes.bfloat16)),
        ("float16", wanted.astype(np.float16)),
    ):
        pipeline = load_pipeline(folder, dtype=dtype)
        leaves = [leaf for name in MODELS for leaf in flatten(getattr(pipeline, name).params).values()]
        assert {leaf.dtype for leaf in leaves} == {rounded.dtype}
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        assert np.asarray(pipeline.unet.params["conv_in"]["kernel"]).tobytes() == rounded.tobytes()
    with pytest.raises(AegisError, match="int8.*use float32"):
        load_pipeline(folder, dtype=jnp.int8)


def test_weights_arrive_while_the_caller_goes_on(tiny_copy, monkeypatch):
    folder, may_read, fill = tiny_copy(sharded=True), threading.Event(), convert._fill
    wanted = torch_tensors(folder, "vae")["decoder.conv_out.bias"].numpy()
    monkeypatch.setattr(convert, "_fill", lambda *args: may_read.wait(60) and fill(*args))
    pipeline = load_pipeline(folder)
    shutil.rmtree(folder)  # its files are open already
    may_read.set()
    np.testing.assert_array_equal(np.asarray(pipeline.vae.params["decoder"]["conv_out"]["bias"]), wanted)
    assert pipeline.vae.params is pipeline.vae.params


def test_a_pipeline_can_be_copied_before_its_weights_are_there(tiny, monkeypatch):
    may_read, fill = threading.Event(), convert._fill
    monkeypatch.setattr(convert, "_fill", lambda *args: may_read.wait(60) and fill(*args))
    pipeline = load_pipeline(tiny())
    threading.Timer(0.2, may_read.set).start()
    assert_loaded(copy.deepcopy(pipeline), tiny())


def test_an_error_while_reading_reaches_whoever_looks(tiny, monkeypatch):
    def broken(*args):
        raise AegisError("the disk is gone")

    monkeypatch.setattr(convert, "_fill", broken)
    pipeline = load_pipeline(tiny())
    for _ in range(2):
        with pytest.raises(AegisError, match="the disk is gone"):
            pipeline.unet.params  # noqa: B018


def test_source_knows_every_tensor(tiny):
    source = load_pipeline(tiny(old_vae_names=True, text_prefix=False)).source
    assert source.origins["vae"]["decoder.mid_block.attentions.0.to_out.0.kernel"].key == (
        "decoder.mid_block.attentions.0.proj_attn.weight"
    )
    assert source.origins["text_encoder"]["text_model.final_layer_norm.scale"].key == ("final_layer_norm.weight")


def test_mismatches_of_all_components_come_together(tiny_copy):
    folder = tiny_copy()
    rename_tensors(folder / "unet", lambda k: k.replace("conv_in.weight", "conv_inn.weight"))
    rename_tensors(folder / "vae", lambda k: k.replace("quant_conv.bias", "quant_con.bias"))
    config = json.loads((folder / "text_encoder/config.json").read_text())
    config["vocab_size"] += 1
    (folder / "text_encoder/config.json").write_text(json.dumps(config))
    with pytest.raises(AegisError) as error:
        load_pipeline(folder)
    message = str(error.value)
    assert "\n" not in message
    # post_quant_conv.bias contains quant_conv.bias and was renamed as well
    assert "do not fit their config.json, 7 problems" in message
    assert "unet: missing 'conv_in.weight' (32, 4, 3, 3)" in message
    assert "unet: unused 'conv_inn.weight' (32, 4, 3, 3)" in message
    assert "vae: missing 'quant_conv.bias' (8,)" in message
    assert "vae: unused 'post_quant_con.bias' (4,)" in message
    assert "token_embedding.weight' has shape (592, 32), wanted (593, 32)" in message


def test_many_mismatches_are_counted(tiny_copy):
    folder = tiny_copy()
    rename_tensors(folder / "unet", lambda key: "model." + key)
    with pytest.raises(AegisError, match="416 problems: unet: missing 'conv_in.b.*; ...; ") as error:
        load_pipeline(folder)
    assert str(error.value).count("unet: missing") == str(error.value).count("unet: unused") == 5


def test_integer_weights_are_refused(tiny_copy):
    from safetensors.torch import save_file

    folder = tiny_copy()
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"].int()}, path, {"format": "pt"})
    with pytest.raises(AegisError, match="'conv_in.bias' has type I32, wanted one of F32, F16, BF16"):
        load_pipeline(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_that_are_not_finite_are_refused(dtype, tiny_copy):
    """Of every parameter type, in tensors that are laid out anew and in others; too large for another type is none."""
    from safetensors.torch import save_file

    folder = tiny_copy(dtype=dtype)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for key, value in (("conv_in.weight", np.nan), ("conv_in.weight", -np.inf), ("conv_out.bias", np.inf)):
        tensor = tensors[key].clone()
        tensor.view(-1)[-1] = value
        save_file({**tensors, key: tensor}, path, {"format": "pt"})
        message = f"unet/diffusion_pytorch_model.safetensors: tensor '{key}' has values that are not finite: download"
        for into in (dtype, "float32"):
            with pytest.raises(AegisError, match=message):
                load_pipeline(folder, dtype=into).unet.params  # noqa: B018
    tensor[-1] = 60_000.0 if dtype == "float16" else 1e30
    save_file({**tensors, "conv_out.bias": tensor, "never.used": tensor * np.nan}, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="never.used"):
        large = load_pipeline(folder, dtype="float16").unet.params["conv_out"]["bias"][-1]
    assert bool(jnp.isinf(large)) == (dtype != "float16")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_pattern_is_told_finite_or_not(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        is_finite = np.isfinite(every)
    assert convert._is_finite(every[is_finite])
    assert not any(convert._is_finite(every[i : i + 1]) for i in np.flatnonzero(~is_finite))


@pytest.fixture
def with_leftovers(tiny_copy):
    """A folder with what PyTorch diffusers reads past: (folder, {component: extra tensors})."""
    import torch
    from safetensors.torch import save_file

    folder = tiny_copy(safety_checker=True)
    config = json.loads((folder / "unet/config.json").read_text())
    ema = {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 1, "use_ema_warmup": False}  # EMAModel's
    (folder / "unet/config.json").write_text(json.dumps(config | ema))
    extra = {
        "text_encoder": {"text_projection.weight": torch.ones(32, 32), "logit_scale": torch.tensor(4.6)},
        "vae": {"loss.logvar": torch.zeros(()), "loss.steps": torch.arange(3)},
    }
    for component, tensors in extra.items():
        path = next((folder / component).glob("*.safetensors"))
        save_file({**load_file(path), **tensors}, path, {"format": "pt"})
    for name in ("safety_checker", "feature_extractor"):
        shutil.rmtree(folder / name)
    return folder, extra


def test_what_diffusers_reads_past_is_named_once_and_exported(with_leftovers, tmp_path, recwarn):
    from diffusers import StableDiffusionPipeline

    folder, extra = with_leftovers
    loaded = load_pipeline(folder)
    (notice,) = [str(w.message) for w in recwarn if w.category is UserWarning]
    for named in (
        "decay, inv_gamma, optimization_step, use_ema_warmup in unet/config.json",
        "logit_scale, text_projection.weight in the weights of text_encoder",
        "loss.logvar, loss.steps in the weights of vae",
        "left out, named in model_index.json without a folder of that name: feature_extractor, safety_checker",
    ):
        assert named in notice
    save_pipeline(loaded, tmp_path / "out")
    assert (tmp_path / "out/unet/config.json").read_bytes() == (folder / "unet/config.json").read_bytes()
    for component, tensors in extra.items():
        (path,) = (tmp_path / "out" / component).glob("*.safetensors")
        assert path.read_bytes() == (folder / component / path.name).read_bytes()
        assert tensors.keys() <= load_file(path).keys()
    # Without any option, as what PyTorch saves after loading the folder with safety_checker=None.
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert theirs.safety_checker is None and theirs.feature_extractor is None


def test_a_long_list_of_unused_tensors_is_cut(tiny_copy):
    from safetensors.torch import save_file

    folder = tiny_copy()
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, **{f"loss.{k:03d}": tensors["quant_conv.bias"].clone() for k in range(60)}}, path)
    with pytest.warns(UserWarning, match=r"loss.049, 10 more in the weights of vae"):
        load_pipeline(folder)


def test_a_tensor_under_two_of_its_names_is_refused(tiny_copy):
    from safetensors.torch import save_file

    folder = tiny_copy()
    path = folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "final_layer_norm.bias": tensors["text_model.final_layer_norm.bias"] + 1}, path)
    with pytest.raises(AegisError, match="'text_model.final_layer_norm.bias' is there twice, also as 'final_layer_"):
        load_pipeline(folder)


MEMORY = """
import gc, json, pathlib, sys
import jax, jax.numpy as jnp
from aegis_jax.io import convert, pipeline, safetensors
from aegis_jax.models import model

abstract = model.abstract(pipeline.MODELS["unet"], json.loads(sys.argv[1]))
headers = (safetensors.read_header(sys.argv[2]),)
origins, problems, unused = convert.match("unet", abstract, headers)
assert not problems and not unused
jax.block_until_ready(jnp.zeros(3) + 1)  # the backend is up
# VmHWM, not getrusage: the latter starts at what the parent process had when it forked.
status = lambda: pathlib.Path("/proc/self/status").read_text()
kilobytes = lambda name: int(status().partition(name + ":")[2].split()[0])
gc.collect()
before = kilobytes("VmRSS")
loaded = convert.read(abstract, origins, headers, sys.argv[3])
jax.block_until_ready(loaded.params)
peak = (kilobytes("VmHWM") - before) * 1024
leaves = model.flatten(loaded.params).values()
assert all(float(leaf.reshape(-1)[0]) == 0.5 for leaf in leaves)
print(json.dumps({"weights": sum(leaf.nbytes for leaf in leaves), "peak": peak}))
"""


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_peak_memory_is_the_weights_and_little_more(wanted, tiny, tmp_path):
    """At most 1.3 x the weights in the target type, on a UNet of 98 million parameters."""
    config = json.loads((tiny() / "unet/config.json").read_text())
    config |= {"block_out_channels": [256, 640], "cross_attention_dim": 512, "layers_per_block": 2}
    leaves = flatten(model.abstract(MODELS["unet"], config).params)
    path = tmp_path / "unet.safetensors"
    entries = [
        safetensors.Entry(layout.torch_key(name), "F32", layout.torch_shape(name, leaf.shape))
        for name, leaf in leaves.items()
    ]
    shapes = {entry.key: entry.shape for entry in entries}
    safetensors.write(path, entries, lambda key, rows: np.full(shapes[key], 0.5, np.float32)[rows])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, json.dumps(config), path, wanted],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result, result["peak"] / result["weights"])
    assert result["weights"] > 190e6
    assert result["peak"] <= 1.3 * result["weights"]
