"""A config.json with a value of the wrong kind is refused by key, whatever the value is."""

import math

import pytest

from aegis_jax.diffusion import schedule
from aegis_jax.errors import AegisError
from aegis_jax.models import clip, model, unet, unet_config, vae

NEVER = [{}, [], [[]], [None, "x"], math.nan, "?", -1.5]
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


@pytest.mark.parametrize("key", ["block_out_channels", "layers_per_block", "norm_num_groups"])
def test_absurd_sizes(key):
    for value in (0, 10**30, True, 2.0, [0], None):
        for module_class in (unet.UNet2DConditionModel, vae.AutoencoderKL):
            with pytest.raises(AegisError, match=key):
                model.abstract(module_class, {key: value})
