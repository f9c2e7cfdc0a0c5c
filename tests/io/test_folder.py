"""Bad input: every kind of folder that is no usable pipeline is refused in one line."""

import json
import re
import shutil

import pytest

from aegis_jax.diffusion.schedule import ddim_config
from aegis_jax.errors import AegisError
from aegis_jax.io import folder as folders
from aegis_jax.io.export import save_pipeline
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models import unet_config, vae


def edit_json(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({key: v for key, v in value.items() if v is not None}))


def refused(source, message, **options):
    with pytest.raises(AegisError) as error:
        load_pipeline(source, **options)
    assert "\n" not in str(error.value)
    assert re.search(message, str(error.value)), str(error.value)


def test_missing_folder(tmp_path, monkeypatch):
    refused(tmp_path / "nothing", "nothing does not exist: give a diffusers folder, a hub id")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("runs/star", "runs/star does not exist in the folder runs")


def test_not_a_pipeline(tmp_path, tiny):
    refused(tmp_path, "is not a diffusers pipeline: it has no model_index.json")
    refused(tiny() / "unet", "no model_index.json: it looks like one component, give the folder")
    (tmp_path / "sd-v1-4.ckpt").write_bytes(b"")
    refused(tmp_path, r"sd-v1-4.ckpt is a pickle.*from_single_file\('.*sd-v1-4.ckpt'\).save_pretr")


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth"])
def test_a_single_pickle(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"\x80\x02}q\x00.")
    refused(path, f"{name} is a pickle, which can run code.*convert it once.*from_single_file")


def test_a_single_safetensors_file(tiny, tmp_path):
    path = shutil.copy(tiny() / "unet/diffusion_pytorch_model.safetensors", tmp_path / "sd.safetensors")
    refused(path, "sd.safetensors is a single file, not a diffusers folder; convert it once")
    (tmp_path / "notes.txt").write_text("")
    refused(tmp_path / "notes.txt", "notes.txt is a file: give a diffusers folder")


@pytest.mark.parametrize("component", ["unet", "text_encoder", "safety_checker"])
def test_pickled_weights(component, tiny_copy):
    folder = tiny_copy(safety_checker=True)
    file = next((folder / component).glob("*.safetensors"))
    file.rename(file.with_name("pytorch_model.bin"))
    message = f"{component}/pytorch_model.bin is a pickle.*from_pretrained.*safe_serialization=True"
    refused(folder, message)


FLAX = r"Flax.*pip install torch .*from_pretrained\('{}', from_flax=True.*save_pretrained"


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_flax_weights_are_refused_with_the_way_to_convert_them(component, tiny_copy):
    folder = tiny_copy()
    (file,) = (folder / component).glob("*.safetensors")
    file = file.rename(file.with_name("flax_model.msgpack"))
    refused(folder, f"{component}/flax_model.msgpack holds " + FLAX.format(folder))
    refused(file, "flax_model.msgpack holds " + FLAX.format(folder))
    refused(folder / component, "no model_index.json: it looks like one component")
    edit_json(folder / "model_index.json", _class_name="FlaxStableDiffusionPipeline")
    refused(folder, "model_index.json: the weights are " + FLAX.format(folder))
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline", unet=["diffusers", "FlaxUNet"])
    refused(folder, "model_index.json: the weights are " + FLAX.format(folder))


def test_a_safety_checker_without_its_feature_extractor_is_not_exported(tiny_copy, tmp_path):
    folder = tiny_copy(safety_checker=True)
    shutil.rmtree(folder / "feature_extractor")
    with pytest.warns(UserWarning, match="left out.*: feature_extractor"):
        loaded = load_pipeline(folder)
    with pytest.raises(AegisError, match="no feature_extractor.*null, null"):
        save_pipeline(loaded, tmp_path / "out")


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionXLPipeline", None])
def test_unsupported_pipelines_are_named(name, tiny_copy):
    folder = tiny_copy()
    edit_json(folder / "model_index.json", _class_name=name)
    refused(folder, f"model_index.json: {name} is not supported; aegis_jax reads Stable Diffusion")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"transformer": ["diffusers", "SD3Transformer2DModel"]},
            r"transformer \(SD3Transformer2DM",
        ),
        (
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "text_encoder is a T5EncoderModel, w",
        ),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet is a UNet3DConditionModel, wanted"),
        ({"vae": None}, "vae is missing"),
        ({"unet": [None, None], "scheduler": None}, "unet is missing; scheduler is missing"),
        ({"tokenizer": ["transformers"]}, r"tokenizer should be \[library, class\]"),
        ({"tokenizer": [1, {}]}, r"tokenizer should be \[library, class\]"),
        ({"../up": ["a", "B"]}, "'../up' is not the name of a component"),
        ({"..": ["a", "B"]}, r"'\.\.' is not the name of a component"),
        ({"": ["a", "B"]}, "'' is not the name of a component"),
        ({"unet_2": ["a", "B"]}, "unet_2 .B. belongs to another architecture"),
    ],
)
def test_unsupported_components_are_named(changes, message, tiny_copy):
    folder = tiny_copy()
    edit_json(folder / "model_index.json", **changes)
    refused(folder, message)


def test_unsupported_options_are_named(tiny_copy):
    folder = tiny_copy()
    edit_json(folder / "unet/config.json", class_embed_type="timestep")
    refused(folder, "class_embed_type")


CONFIGS = [f"{name}/config.json" for name in ("unet", "vae", "text_encoder")]


@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json", *CONFIGS])
def test_broken_configs(file, tiny_copy):
    for content, message in {
        '{"a": ': f"{file} is not valid JSON",
        "[]": f"{file} holds a JSON list, wanted an object",
        "[" * 100_000: f"{file} is not valid JSON",
    }.items():
        folder = tiny_copy()
        (folder / file).write_text(content)
        refused(folder, message)
    folder = tiny_copy()
    (folder / file).write_bytes(b'{"a": "\xff"}')
    refused(folder, f"{file} is not valid JSON")
    (folder / file).unlink()
    refused(folder, f"{file} is missing|has no model_index.json")


@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json", *CONFIGS])
def test_configs_that_nest_too_deeply_to_be_copied(file, tiny_copy):
    folder = tiny_copy()
    known = (folder / file).read_text().rstrip().removesuffix("}")
    for opened, closed in ("[]", ('{"x":', "}")):
        (folder / file).write_text(f'{known}, "notes": {opened * 900}{"0" * (closed == "}")}{closed * 900}}}')
        refused(folder, f"{file} is not valid JSON .nested too deeply.: mend it")
    (folder / file).write_text(f'{known}, "_notes": {"[" * 90}{"]" * 90}}}')
    load_pipeline(folder)


def test_lists_in_the_index_that_are_no_components_are_read_past(tiny_copy, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = tiny_copy()
    # A pair of texts is a component that the pipeline's class does not take, and the folder does not have.
    others = {"controlnet": ["diffusers", "ControlNetModel"], "left_out": [None, None]}
    edit_json(folder / "model_index.json", tags=["a", "b", "c"], sizes=[512, 512], _notes=["x"], **others)
    with pytest.warns(
        UserWarning, match="not used, in diffusers neither.*: controlnet, sizes, tags in model_index.json$"
    ):
        loaded = load_pipeline(folder)
    save_pipeline(loaded, tmp_path / "out")
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet.config.sample_size == 8


def test_values_that_diffusers_filled_in_as_it_saved_are_those_of_its_classes(tiny_copy):
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    folder = tiny_copy()
    classes = {"scheduler": DDIMScheduler, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
    said = {
        "scheduler": {"timestep_spacing": "linspace", "beta_end": 0.5, "set_alpha_to_one": True},
        "unet": {"sample_size": 99, "norm_eps": 0.5},
        "vae": {"scaling_factor": 99.0, "act_fn": "relu"},
    }
    for name, values in said.items():
        file = folder / name / folders.CONFIGS[name]
        edit_json(file, **values, _use_default_values=[key for key in values if key != "set_alpha_to_one"])
    loaded = load_pipeline(folder)
    found = {
        "scheduler": ddim_config(loaded.scheduler),
        "unet": unet_config.check(loaded.unet.config),
        "vae": vae._checked(loaded.vae.config),
    }
    for name, values in said.items():
        theirs = classes[name].from_pretrained(folder / name).config
        assert {key: found[name][key] for key in values} == {key: theirs[key] for key in values}
    assert loaded.scheduler["set_alpha_to_one"] is True


@pytest.mark.parametrize("architecture", ["CLIPTextModelWithProjection", "CLIPModel"])
def test_a_text_encoder_saved_as_part_of_another_clip(architecture, tiny_copy):
    folder = tiny_copy()
    edit_json(folder / "text_encoder/config.json", architectures=[architecture])
    load_pipeline(folder).text_encoder.params  # noqa: B018


@pytest.mark.parametrize(
    ("component", "sizes", "message"),
    [
        ("vae", {"latent_channels": 2**31 - 1}, r"vae config .*latent_channels=2147483647 .wanted: .* to 2\*\*24"),
        ("unet", {"conv_in_kernel": 2**31 - 1}, "unet config .*conv_in_kernel=2147483647 .wanted: .* to 99"),
        ("unet", {"block_out_channels": [2**31 - 16] * 2}, r"unet config .*block_out_channels=\[2147483632,"),
        ("text_encoder", {"hidden_size": 2**31 - 4}, "text encoder config .*hidden_size=2147483644"),
        ("unet", {"block_out_channels": [2**24] * 2}, "unet: 'conv_in.bias' has shape .32,., wanted .16777216,"),
    ],
)
def test_absurd_sizes(component, sizes, message, tiny_copy):
    folder = tiny_copy()
    edit_json(folder / component / "config.json", **sizes)
    refused(folder, message)


def test_classes_must_agree(tiny_copy):
    folder = tiny_copy()
    edit_json(folder / "vae/config.json", _class_name="AsymmetricAutoencoderKL")
    refused(folder, "_class_name is AsymmetricAutoencoderKL, model_index.json says AutoencoderKL")


def test_missing_parts(tiny_copy):
    for component in ("unet", "vae", "text_encoder"):
        folder = tiny_copy()
        next((folder / component).glob("*.safetensors")).unlink()
        refused(folder, f"{component} has no weights: wanted (diffusion_pytorch_)?model.safetensors")
        shutil.rmtree(folder / component)
        refused(folder, f"names the component {component} but there is no folder")
    folder = tiny_copy()
    (folder / "tokenizer/merges.txt").unlink()
    refused(folder, "tokenizer holds no tokenizer")


def test_damaged_weights(tiny_copy):
    folder = tiny_copy()
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    for damaged, message in {
        content[:-1000]: "unet/diffusion_pytorch_model.safetensors: tensor .* should end at byte",
        content[:500]: "header claims .* bytes but the file has 500",
        b"\xff" * 8 + content[8:]: "the header claims 18446744073709551615 bytes, safetensors allows",
        content[:20] + b"\0" + content[21:]: "the header is not valid JSON",
    }.items():
        path.write_bytes(damaged)
        refused(folder, message)


def test_variants(tiny, tiny_copy):
    refused(tiny(dtype="float16", variant="fp16"), "weights of variant fp16 only: give variant='fp16'")
    refused(tiny(), "no weights of variant 'fp16': it has no variants", variant="fp16")
    both = tiny_copy(dtype="float16", variant="fp16")
    refused(both, "variant 'fp32': variants there: fp16", variant="fp32")
    # A component without the variant falls back to the plain name, as in diffusers.
    (both / "vae/diffusion_pytorch_model.fp16.safetensors").rename(both / "vae/diffusion_pytorch_model.safetensors")
    found = folders.examine(both, "fp16")
    assert found.components["vae"].weights.headers[0].path.name.count("fp16") == 0
    assert found.components["unet"].weights.headers[0].path.name.count("fp16") == 1


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "safety_checker"])
@pytest.mark.parametrize("options", [{}, {"sharded": True}, {"variant": "fp16"}], ids=["plain", "sharded", "variant"])
def test_weights_of_a_name_that_diffusers_does_not_read(component, options, tiny_copy):
    """Beside those that it does they are not looked at; alone they are no weights."""
    folder, variant = tiny_copy(safety_checker=True, **options), options.get("variant")
    stems = ["diffusion_pytorch_model", "model"]
    mine, other = stems if component in ("unet", "vae") else stems[::-1]
    for file in list((folder / component).glob(f"{mine}*")):
        (folder / component / file.name.replace(mine, other)).write_bytes(b"no weights")
    found = folders.examine(folder, variant).components[component].weights
    assert all(header.path.name.startswith(mine) for header in found.headers)
    for file in list((folder / component).glob(f"{mine}*")):
        file.unlink()
    message = f"{component} has no weights of a name that diffusers reads: wanted {mine}.safetensors, found {other}"
    refused(folder, message, variant=variant)


def test_a_variant_is_named_before_the_pickles_beside_it(tiny_copy):
    folder = tiny_copy(dtype="float16", variant="fp16")
    for component in ("unet", "vae", "text_encoder"):
        (folder / component / "pytorch_model.bin").touch()
    refused(folder, "weights of variant fp16 only: give variant='fp16' .--variant fp16")
    assert folders.examine(folder, "fp16").components["unet"].weights
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name("other.lora.safetensors"))  # which is no variant of the weights
    refused(folder, "pytorch_model.bin is a pickle")


def test_a_variant_may_have_a_hyphen(tiny_copy):
    folder = tiny_copy()
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(folder / "unet/diffusion_pytorch_model.no-ema.safetensors")
    refused(folder, "weights of variant no-ema only: give variant='no-ema'")
    assert folders.examine(folder, "no-ema").components["unet"].weights.names == (weights.name,)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_number_of_a_shard_is_no_part_of_its_variant(tiny, sharded):
    refused(tiny(dtype="float16", variant="fp16", sharded=sharded), "variants there: fp16", variant="fp32")


def test_broken_indices(tiny_copy):
    folder = tiny_copy(sharded=True)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    good = json.loads(index.read_text())
    table = good["weight_map"]
    first = table["conv_in.bias"]
    for broken, message in (
        ({}, "weight_map should give every tensor its file"),
        ({"weight_map": []}, "weight_map should give every tensor its file"),
        ({"weight_map": {"a": 1}}, "weight_map should give every tensor its file"),
        (
            {"weight_map": table | {"conv_in.bias": "../x.safetensors"}},
            "is not the name of a safet",
        ),
        ({"weight_map": table | {"conv_in.bias": "evil.bin"}}, "is not the name of a safetensors"),
        (
            {"weight_map": table | {"conv_in.bias": "x.safetensors"}},
            "x.safetensors is missing, dif",
        ),
        (
            {"weight_map": table | {"new": first}},
            f"disagree on 1 tensors; first 'new': {first} does",
        ),
        (
            {"weight_map": {k: v for k, v in table.items() if k != "conv_in.bias"}},
            "disagree on 1 tensors; first 'conv_in.bias': .* holds it, the index does not say so",
        ),
    ):
        index.write_text(json.dumps(broken))
        refused(folder, message)
    index.write_text(json.dumps(good))
    (folder / "unet" / first).unlink()
    refused(folder, f"{first} is missing, diffusion_pytorch_model.safetensors.index.json names it")


def test_legacy_name_of_a_variants_index(tiny_copy):
    folder = tiny_copy(dtype="float16", variant="fp16", sharded=True)
    new = folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    new.rename(folder / "unet/diffusion_pytorch_model.safetensors.fp16.index.json")
    assert len(folders.examine(folder, "fp16").components["unet"].weights.headers) > 1
