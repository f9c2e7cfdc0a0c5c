"""Sampling's own promises; that its images are diffusers' is tests/parity/test_sampling.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aegis_jax
from aegis_jax.diffusion import predict, schedule
from aegis_jax.diffusion import sample as lib
from aegis_jax.diffusion.conditioning import Conditioning, encode
from aegis_jax.errors import AegisError

pytest.importorskip("torch")  # tests/tiny.py writes the pipelines with it


@pytest.fixture(scope="module")
def pipeline(tiny):
    return aegis_jax.load_pipeline(tiny())


def with_config(pipeline, component, **changes):
    model = getattr(pipeline, component)
    changed = dataclasses.replace(model, config={**model.config, **changes})
    return dataclasses.replace(pipeline, **{component: changed})


def close(found, wanted):
    return np.abs(found.astype(int) - wanted.astype(int)).max() <= 1


def test_an_image_depends_on_its_seed_and_place_not_on_the_batch(pipeline):
    prompts = ["a red star", "a blue circle", ""]
    images = lib.sample(pipeline, prompts, seed=3, steps=3)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert close(lib.sample(pipeline, prompts, seed=3, steps=3, batch=2), images)
    assert close(lib.sample(pipeline, prompts[:2], seed=3, steps=3), images[:2])
    assert not close(lib.sample(pipeline, prompts, seed=4, steps=3), images)
    assert len({image.tobytes() for image in images}) == 3


def test_with_a_seed_each_an_image_depends_on_prompt_and_seed_alone(pipeline):
    prompts, seeds = ["a red star", "a blue circle", "a red star", ""], [3, 2**32 - 1, 3, 7]
    images = lib.sample(pipeline, prompts, seed=seeds, steps=3)
    assert close(images[0], images[2])
    for k, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        assert close(lib.sample(pipeline, prompt, seed=seed, steps=3)[0], images[k])
    back = lib.sample(pipeline, prompts[::-1], seed=np.array(seeds[::-1]), steps=3, batch=3)
    assert close(back[::-1], images)
    assert not close(lib.sample(pipeline, prompts[0], seed=4, steps=3)[0], images[0])


@pytest.mark.parametrize("setting", [jax.default_prng_impl("rbg"), jax.threefry_partitionable(False)])
def test_start_noise_is_a_seeds_own_whatever_draws_elsewhere(pipeline, setting):
    with setting:
        together = lib._start(pipeline, 3, [5, 6, 7], None)
        alone = [lib._start(pipeline, 1, seed, None)[0] for seed in (5, 6, 7)]
    np.testing.assert_array_equal(together, alone)


def test_the_size_is_given_in_pixels(pipeline):
    latents = np.asarray(lib._start(pipeline, 1, 3, None, 24, 16))
    assert latents.shape == (1, 12, 8, 4)
    image = lib.sample(pipeline, "a star", seed=3, steps=2, height=24, width=16)
    assert image.shape == (1, 24, 16, 3)
    np.testing.assert_array_equal(image, lib.sample(pipeline, "a star", steps=2, latents=latents))
    assert lib.latent_shape(pipeline, width=32) == (8, 16, 4)  # the other side is the UNet's
    unsized = with_config(pipeline, "unet", sample_size=None)
    assert lib.latent_shape(unsized, 16, 24) == (8, 12, 4)
    with pytest.raises(AegisError, match="pass height and width"):
        lib.latent_shape(unsized, 16)


def test_the_same_call_gives_the_same_bytes(pipeline):
    one, two = (lib.sample(pipeline, ["a red star"] * 2, steps=3) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_start_noise_has_unit_variance(pipeline):
    start = np.asarray(lib._start(pipeline, 400, 0, None))
    assert start.shape == (400, 8, 8, 4)
    assert abs(start.mean()) < 0.02 and abs(start.std() - 1) < 0.02
    assert np.abs(np.corrcoef(start.reshape(400, -1)[:20]) - np.eye(20)).max() < 0.35


def test_step_count_and_guidance_do_not_recompile(pipeline):
    lib.sample(pipeline, ["a", "b"], steps=2)
    compiled = lib._denoise._cache_size()
    for steps, guidance in ((3, 7.5), (5, 2.0), (11, 1.5)):
        lib.sample(pipeline, ["a", "b"], steps=steps, guidance=guidance, seed=steps)
    assert lib._denoise._cache_size() == compiled


def test_progress_counts_every_step_and_changes_nothing(pipeline):
    prompts = ["a red star", "a blue circle", "a dog"]
    calls = []
    images = lib.sample(pipeline, prompts, steps=2, batch=2, progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert close(images, lib.sample(pipeline, prompts, steps=2, batch=2))


def test_guidance_of_one_ignores_the_negative_prompt(pipeline):
    prompts = ["a red star", "a cat"]
    one = lib.sample(pipeline, prompts, steps=2, guidance=1.0, negative_prompt="a dog")
    np.testing.assert_array_equal(one, lib.sample(pipeline, prompts, steps=2, guidance=0.5))
    guided = lib.sample(pipeline, prompts, steps=2, guidance=7.5)
    other = lib.sample(pipeline, prompts, steps=2, guidance=7.5, negative_prompt="a dog")
    assert (guided != other).any()
    # None is what diffusers' own default is: the empty prompt.
    np.testing.assert_array_equal(guided, lib.sample(pipeline, prompts, steps=2, guidance=7.5, negative_prompt=None))


def test_a_run_may_stop_and_continue_at_any_step(pipeline):
    noise = schedule.make_schedule(pipeline.scheduler)
    timesteps = schedule.ddim_timesteps(pipeline.scheduler, 5)
    model, start = pipeline.unet, jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    cond, uncond = (encode(pipeline, texts) for texts in (["a star", "a dog"], ["", ""]))

    def part(z, first, last):
        return lib.sample_latents(
            model.graph, model.params, noise, cond, uncond, z, timesteps, 3.0,
            first=first, last=last,
        )  # fmt: skip

    whole = part(start, 0, None)
    np.testing.assert_allclose(part(part(start, 0, 2), 2, 5), whole, atol=1e-5)
    np.testing.assert_array_equal(part(start, jnp.int32(3), jnp.int32(3)), start)
    # The same five steps written out: predict, guide, step.
    z = start
    for t, t_prev in zip(timesteps, timesteps - 200, strict=True):
        eps = [lib.predict_noise(pipeline, z, t, text) for text in (uncond, cond)]
        z = schedule.ddim_step(noise, schedule.guide(*eps, 3.0), z, t, t_prev)
    np.testing.assert_allclose(whole, z, atol=2e-5)


def test_bfloat16_parameters_compute_in_bfloat16(pipeline):
    model = pipeline.unet
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    small = dataclasses.replace(pipeline, unet=dataclasses.replace(model, params=halved))
    text = lib.encode_text(pipeline, ["a star", "a dog"])
    z = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    wanted = lib.predict_noise(pipeline, z, 500, text)
    found = lib.predict_noise(small, z, 500, text)
    assert found.dtype == jnp.float32
    output = functools.partial(predict.output, model.graph)
    program = jax.jit(output).lower(halved, z, 500, Conditioning(text)).as_text()
    convolutions = [line for line in program.splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all("xbf16>" in line and "xf32>" not in line for line in convolutions)
    assert 1e-4 < float(jnp.abs(found - wanted).max()) < 0.1 * float(jnp.abs(wanted).max())


def test_images_round_to_the_nearest_level():
    levels = np.array([0.0, 1.0, 0.5 / 255, 1.5 / 255, 100.49 / 255, 100.51 / 255])
    np.testing.assert_array_equal(lib.to_uint8(levels), [0, 255, 0, 2, 100, 101])


@pytest.mark.parametrize(
    ("side", "n", "wanted", "on_cpu"), [(8, 500, 64, 16), (64, 9, 2, 1), (96, 9, 1, 1), (8, 3, 3, 3)]
)
def test_large_images_run_in_small_batches(side, n, wanted, on_cpu):
    shape = n, side, side, 4
    assert lib._batch_size(None, shape, lib.LATENT_PIXELS_PER_CALL) == wanted
    assert lib._batch_size(None, shape, lib.LATENT_PIXELS_PER_CPU_CALL) == on_cpu


def test_calls_side_by_side_give_the_images_of_calls_one_after_another(pipeline, monkeypatch):
    prompts = ["a red star", "a blue circle", "a dog", ""] * 2
    monkeypatch.setattr(lib, "cores", lambda: 1)
    alone = lib.sample(pipeline, prompts, steps=3, batch=2)
    monkeypatch.setattr(lib, "cores", lambda: 4)
    calls = []
    together = lib.sample(pipeline, prompts, steps=3, batch=2, progress=lambda *call: calls.append(call))
    assert close(together, alone)
    assert calls == [(k, 12) for k in range(1, 13)]


def test_wrong_arguments_are_named(pipeline):
    text = jnp.zeros((2, 77, 32))
    z = jnp.zeros((2, 8, 8, 4))
    noise = {"latents": z, "t": np.array([1, 2]), "text_emb": text}
    wrong = [
        ({"latents": jnp.zeros((2, 4, 8, 8))}, "channels come last"),
        ({"latents": jnp.zeros((8, 8, 4))}, "latents have shape"),
        ({"latents": "noise"}, "latents is not an array"),
        ({"t": np.array([1, 2, 3])}, "t has shape"),
        ({"t": 1000}, "from 0 to 999"),
        ({"t": -1}, "from 0 to 999"),
        ({"t": 0.5}, "whole numbers"),
        ({"text_emb": text[:1]}, "text embedding"),
        ({"text_emb": text[:, :, :16]}, "text embedding"),
    ]
    for change, message in wrong:
        with pytest.raises(AegisError, match=message):
            lib.predict_noise(pipeline, **{**noise, **change})
    with pytest.raises(AegisError, match="latents have shape"):
        lib.decode(pipeline, jnp.zeros((1, 8, 8, 3)))
    options = [
        ({"prompts": []}, "prompts"),
        ({"prompts": [3]}, "prompts"),
        ({"steps": 0}, "steps"),
        ({"guidance": "high"}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": 1e39}, "guidance"),
        ({"guidance": 10**400}, "guidance"),
        ({"seed": 1.5}, "seed"),
        ({"seed": [1, 2]}, "seed has 2 numbers for 1 prompts"),
        ({"seed": ["1"]}, "seed"),
        ({"height": 15}, "height = 15, wanted a multiple of 2"),
        ({"width": -2}, "width"),
        ({"height": 2**40, "width": 2**40}, "width x height are 1099511627776 x 1099511627776 .*at most 65536 a side"),
        ({"width": 16.0}, "width"),
        ({"height": 16, "latents": z[:1]}, "height and width do not go with latents"),
        ({"batch": 0}, "batch"),
        ({"latents": z}, "latents have shape"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
    ]
    for change, message in options:
        with pytest.raises(AegisError, match=message):
            lib.sample(pipeline, **{"prompts": ["a"], **change})


def test_pipelines_that_cannot_be_sampled_are_named(pipeline):
    zero_snr = {
        **pipeline.scheduler,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    cases = [
        (dataclasses.replace(pipeline, scheduler=zero_snr), "rescale_betas_zero_snr"),
        (with_config(pipeline, "unet", in_channels=9), "in_channels = 9"),
        (with_config(pipeline, "unet", sample_size=None), "sample_size"),
        (with_config(pipeline, "unet", sample_size=2**30), "at most 65536"),
        (with_config(pipeline, "unet", cross_attention_dim=48), "cross_attention_dim"),
        (with_config(pipeline, "unet", cross_attention_dim=[32, 48]), "cross_attention_dim"),
        (with_config(pipeline, "vae", latent_channels=8), "4 channels .out_channels., the VAE's 8"),
        *((with_config(pipeline, "vae", out_channels=n), f"out_channels = {n}, wanted 3") for n in (1, 2, 4)),
    ]
    for broken, message in cases:
        with pytest.raises(AegisError, match=message):
            lib.sample(broken, "a")


DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
MID, CROSS_MID = "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"


@pytest.mark.parametrize(
    ("down", "up", "mid", "layers"),
    [
        ([CROSS_DOWN, DOWN, DOWN], [UP, UP, UP], MID, 1),
        ([DOWN, DOWN, DOWN], [UP, UP, CROSS_UP], MID, 1),
        ([DOWN, CROSS_DOWN, DOWN], [CROSS_UP, UP, UP], None, 1),
        ([DOWN, DOWN, DOWN], [UP, UP, UP], CROSS_MID, 1),
        ([DOWN, DOWN, DOWN], [UP, UP, UP], MID, 1),
        ([CROSS_DOWN] * 3, [CROSS_UP] * 3, CROSS_MID, [1, 0, 2]),
    ],
)
def test_of_several_widths_of_text_those_count_that_attention_has(down, up, mid, layers):
    from diffusers import UNet2DConditionModel

    config = {
        "block_out_channels": [4, 4, 4],
        "norm_num_groups": 2,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": mid,
        "cross_attention_dim": [12, 20, 28],
        "transformer_layers_per_block": layers,
    }
    modules = dict(UNet2DConditionModel(**config).named_modules())
    wanted = {module.in_features for name, module in modules.items() if name.endswith("attn2.to_k")}
    assert lib.text_widths(config) == wanted


def test_images_that_are_not_finite_are_refused(pipeline):
    for name in ("unet", "vae"):
        model = getattr(pipeline, name)
        broken = dataclasses.replace(model, params=jax.tree.map(lambda x: x * np.nan, model.params))
        with pytest.raises(AegisError, match="not finite"):
            lib.sample(dataclasses.replace(pipeline, **{name: broken}), "a", steps=1)
