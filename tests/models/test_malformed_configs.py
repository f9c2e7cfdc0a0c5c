"""A config.json with a value of the wrong kind is refused by key, whatever the value is."""

import inspect
import math

import pytest

from aegis_jax.diffusion import schedule
from aegis_jax.errors import AegisError
from aegis_jax.models import clip, clip_model, layout, model, unet, unet_config, vae

NEVER = [{}, [], [[]], [None, "x"], math.nan, "?", -1.5, 10**400]
MODELS = {
    "unet": (unet.UNet2DConditionModel, {**unet_config._DEFAULTS, "norm_num_groups": 32}),
    "vae": (vae.AutoencoderKL, vae._DEFAULTS),
    "text encoder": (clip.CLIPTextModel, clip._TEXT_DEFAULTS),
}
# Numbers of any sign, and what is read for information only.
LENIENT = {"freq_shift", "dropout", "upcast_attention", "force_upcast", "sample_size"}


@pytest.mark.parametrize("what", MODELS)
def test_models(what):
    module_class, defaults = MODELS[what]
    for key in defaults.keys() - LENIENT:
        for value in NEVER:
            with pytest.raises(AegisError, match=key):
                model.abstract(module_class, {**defaults, key: value})


def test_schedules():
    for key in schedule.DDIM_DEFAULTS:
        for value in NEVER:
            with pytest.raises(AegisError, match=key):
                schedule.make_schedule({key: value})


def test_what_is_no_option_of_diffusers_is_read_past_and_all_that_is_are_known():
    diffusers = pytest.importorskip("diffusers")
    for what, theirs, unknown in (
        ("unet", diffusers.UNet2DConditionModel, unet_config.unknown),
        ("vae", diffusers.AutoencoderKL, vae.unknown),
    ):
        options = inspect.signature(theirs.__init__).parameters.keys() - {"self"}
        assert unknown(dict.fromkeys(options)) == []
        assert unknown({"decay": 0.9999, "_name_or_path": "x"}) == ["decay"]
        model.abstract(MODELS[what][0], {**MODELS[what][1], "decay": 0.9999, "use_ema_warmup": True})


@pytest.mark.parametrize("key", ["block_out_channels", "layers_per_block", "norm_num_groups"])
def test_absurd_sizes(key):
    for value in (0, 10**30, True, 2.0, [0], None):
        for module_class in (unet.UNet2DConditionModel, vae.AutoencoderKL):
            with pytest.raises(AegisError, match=key):
                model.abstract(module_class, {key: value})


def test_an_abstract_model_may_be_larger_than_any_array():
    vision = dict.fromkeys(("hidden_size", "num_attention_heads", "patch_size", "image_size"), 2**24)
    params = model.abstract(clip_model.CLIPModel, {"vision_config": vision}).params
    kernel = params["vision_model"]["embeddings"]["patch_embedding"]["kernel"]
    assert layout.torch_shape("patch_embedding.kernel", kernel.shape) == (2**24, 3, 2**24, 2**24)


def test_layers_without_end_are_refused_before_one_is_built():
    for what, key in (("unet", "layers_per_block"), ("vae", "layers_per_block"), ("text encoder", "num_hidden_layers")):
        with pytest.raises(AegisError, match=f"{key}=100000000 .*1000"):
            model.abstract(MODELS[what][0], {key: 10**8})
    with pytest.raises(AegisError, match="num_train_timesteps"):
        schedule.make_schedule({"num_train_timesteps": 2**30})


def test_a_text_config_inside_a_clip_config_is_refused_not_ignored():
    with pytest.raises(AegisError, match="model_type=.clip. with a text_config"):
        model.abstract(clip.CLIPTextModel, {"model_type": "clip", "text_config": {"hidden_size": 16}})


@pytest.mark.parametrize(
    ("version", "size", "wanted"),
    [("0.2.2", 32, 64), ("0.8.1", 96, 96), ("0.9.0", 32, 32), ("0.42.1", 8, 8), (None, 32, 32), ("0.2.2", [8, 8], 8)],
)
def test_a_unet_from_before_diffusers_0_9_means_64(version, size, wanted):
    config = {"sample_size": size} | ({} if version is None else {"_diffusers_version": version})
    assert unet_config.native_size(config) == (wanted, wanted)


def test_a_unet_may_leave_its_size_open():
    assert unet_config.native_size({}) is unet_config.native_size({"sample_size": None}) is None
    assert unet_config.native_size({"sample_size": [24, 40]}) == (24, 40)
