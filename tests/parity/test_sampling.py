"""Whole images against a diffusers pipeline from the same folder, latents and prompts."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

import aegis_jax
from tests.parity import compare

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPTS = ["a photo of a red star", "", "the church in the sky"]
# The published SD 1.4 file: a PNDM sampler, of which DDIM takes over only the betas and offsets.
PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
# Files of 2022 say nothing of clipping, and those of other samplers never do.
OLD_PNDM = {k: v for k, v in PNDM.items() if k not in ("clip_sample", "set_alpha_to_one")}
OLD_DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 0, "clip_sample": True}
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "linear",
    "timestep_spacing": "linspace",
    "use_karras_sigmas": True,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
}
ZERO_SNR = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@functools.cache
def both(folder):
    """(ours, diffusers') of one folder."""
    torch_pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False
    )
    torch_pipeline.set_progress_bar_config(disable=True)
    return aegis_jax.load_pipeline(folder), torch_pipeline


def latents(n, height=8, width=8):
    return np.random.default_rng(7).standard_normal((n, height, width, 4), np.float32)


def run_torch(pipeline, scheduler, prompts, start, steps, guidance, negative):
    ddim = diffusers.DDIMScheduler.from_config(scheduler)
    # Through the constructor, which turns clip_sample off and steps_offset to 1.
    pipeline = diffusers.StableDiffusionPipeline(
        **(pipeline.components | {"scheduler": ddim}), requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        # diffusers wants as many as there are prompts.
        negative_prompt=[negative] * len(prompts) if isinstance(negative, str) else negative,
        latents=torch.from_numpy(start).permute(0, 3, 1, 2),
        height=start.shape[1] * pipeline.vae_scale_factor,
        width=start.shape[2] * pipeline.vae_scale_factor,
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def assert_same_images(found, wanted):
    gap = np.abs(found.astype(int) - wanted)
    compare.record("images", "largest difference in grey levels", gap.max())
    compare.record("images", "share of values that differ", (gap > 0).mean())
    assert gap.max() <= 1


@pytest.mark.filterwarnings("ignore:The configuration file:FutureWarning")
@pytest.mark.parametrize(
    ("v_prediction", "scheduler", "steps", "guidance", "negative"),
    [
        (False, None, 4, 7.5, ""),
        (False, PNDM, 7, 7.5, "a dotted dog"),
        (False, OLD_PNDM, 5, 3.0, ["a cat", "", "blue"]),
        (False, OLD_DDIM, 5, 3.0, ""),
        (False, EULER, 6, 7.5, ""),
        (False, PNDM, 3, 1.0, "of no effect"),
        (True, None, 5, 7.5, ""),
        (True, ZERO_SNR, 4, 2.0, "plain"),
    ],
    ids=["folders_own", "pndm", "old_pndm", "old_ddim", "euler", "no_guidance", "v", "v_zero_snr"],
)
def test_images_match_diffusers(tiny, v_prediction, scheduler, steps, guidance, negative):
    ours, theirs = both(tiny(v_prediction=v_prediction))
    scheduler = scheduler or ours.scheduler
    ours = type(ours)(ours.unet, ours.vae, ours.text_encoder, ours.tokenizer, scheduler)
    start = latents(len(PROMPTS))
    wanted = run_torch(theirs, scheduler, PROMPTS, start, steps, guidance, negative)
    found = aegis_jax.sample(ours, PROMPTS, steps=steps, guidance=guidance, negative_prompt=negative, latents=start)
    assert found.dtype == np.uint8 and found.shape == wanted.shape == (3, 16, 16, 3)
    assert wanted.std() > 5  # an image, not a flat field that anything would match
    assert_same_images(found, wanted)


def test_image_that_is_not_square_nor_of_the_models_size(tiny):
    ours, theirs = both(tiny())
    start = latents(1, 12, 20)
    wanted = run_torch(theirs, ours.scheduler, PROMPTS[:1], start, 2, 1.0, None)
    found = aegis_jax.sample(ours, PROMPTS[0], steps=2, guidance=1, latents=start)
    assert found.shape == (1, 24, 40, 3)
    assert_same_images(found, wanted)


@pytest.mark.parametrize("v_prediction", [False, True])
def test_text_and_noise_match_diffusers(tiny, v_prediction):
    ours, theirs = both(tiny(v_prediction=v_prediction))
    with torch.no_grad():
        wanted_text, _ = theirs.encode_prompt(PROMPTS, "cpu", 1, False)
        text = aegis_jax.encode_text(ours, PROMPTS)
        compare.assert_output(text, wanted_text.numpy(), "pipeline text")
        start, t = latents(3), np.array([0, 500, 999])
        z_t = torch.from_numpy(start).permute(0, 3, 1, 2)
        output = theirs.unet(z_t, torch.from_numpy(t), wanted_text).sample
        if v_prediction:
            # Independent of DDIM: the training target v = sqrt(a) eps - sqrt(1-a) z_0, solved for
            # eps together with z_t = sqrt(a) z_0 + sqrt(1-a) eps.
            scheduler = diffusers.DDIMScheduler.from_config(ours.scheduler)
            a = scheduler.alphas_cumprod[torch.from_numpy(t)].double().reshape(-1, 1, 1, 1)
            z_0 = a.sqrt() * z_t - (1 - a).sqrt() * output
            output = (z_t - a.sqrt() * z_0) / (1 - a).sqrt()
    found = aegis_jax.predict_noise(ours, start, t, text)
    compare.assert_output(found, compare.nhwc(output), "pipeline noise")


def test_decoded_images_match_diffusers(tiny):
    ours, theirs = both(tiny())
    z_0 = latents(2) * 0.5
    with torch.no_grad():
        scaled = torch.from_numpy(z_0).permute(0, 3, 1, 2) / theirs.vae.config.scaling_factor
        wanted = (theirs.vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1)
    found = aegis_jax.decode(ours, jnp.asarray(z_0))
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    compare.assert_output(found, compare.nhwc(wanted), "pipeline decoded")


def test_clip_skip_by_the_number_of_layers(tiny_copy):
    """`num_hidden_layers` below the file's: PyTorch leaves the last layers unread, and so do we."""
    folder = tiny_copy()
    _, theirs = both(folder)
    ids = theirs.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = theirs.text_encoder(ids, output_hidden_states=True).hidden_states
        norm = next(m for name, m in theirs.text_encoder.named_modules() if name.endswith("final_layer_norm"))
        wanted = norm(states[-2]).numpy()
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] -= 1
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=f"encoder.layers.{config['num_hidden_layers']}.*weights of text_encoder"):
        ours = aegis_jax.load_pipeline(folder)
    compare.assert_output(aegis_jax.encode_text(ours, PROMPTS), wanted, "pipeline text")
