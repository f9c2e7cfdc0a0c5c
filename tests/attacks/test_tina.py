"""Text-free inversion on a tiny random pipeline: against PyTorch in float64, back to the picture, and in diffusers."""

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.attacks import METHODS, attack
from aegis_jax.attacks.images import encode_images
from aegis_jax.attacks.result import FAILED, SUCCEEDED
from aegis_jax.attacks.tina import TINAConfig, invert
from aegis_jax.diffusion.conditioning import encode, per_latent
from aegis_jax.diffusion.sample import sample_latents
from aegis_jax.diffusion.schedule import ddim_timesteps, make_schedule
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from tests.tiny import FEWEST

torch = pytest.importorskip("torch")
STEPS = 4
CONFIG = TINAConfig(iterations=3, learning_rate=0.02)


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny(**FEWEST))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def inverted(pipeline, images):
    z_0 = encode_images(pipeline, images)
    return z_0, *invert(pipeline, z_0, ddim_timesteps(pipeline.scheduler, STEPS), CONFIG)


def test_the_inversion_matches_pytorch_in_float64(tiny, inverted):
    from tests.parity import torch_aegis as reference

    z_0, found, losses = inverted
    side = reference.load(tiny(**FEWEST))
    a = side.alphas_cumprod
    with torch.no_grad():
        empty = reference.prompt_embedding(side, None, [])
    for row in range(2):
        z_s = torch.tensor(np.asarray(z_0[row : row + 1]), dtype=torch.float64)
        for i, t in enumerate([1, 251, 501, 751]):
            # set_alpha_to_one is false: before the first step lies the first noise level.
            low, high = a[max(t - 250, 0)], a[t]

            def up(z, z_s=z_s, t=t, low=low, high=high):
                eps = reference.predict_noise(side, z, torch.tensor([t]), empty)
                return (high / low).sqrt() * (z_s - (1 - low).sqrt() * eps) + (1 - high).sqrt() * eps

            with torch.no_grad():
                z_t = up(z_s)
            z_t.requires_grad_(True)
            optimiser = torch.optim.AdamW([z_t], lr=CONFIG.learning_rate, weight_decay=1e-2)
            for _ in range(CONFIG.iterations):
                loss = (up(z_t) - z_t).square().mean()
                (z_t.grad,) = torch.autograd.grad(loss, z_t)
                optimiser.step()
            np.testing.assert_allclose(losses[i, row], loss.item(), 2e-3, 1e-6)
            z_s = z_t.detach()
        np.testing.assert_allclose(found[row], z_s[0], atol=2e-3)


@pytest.mark.slow
def test_iterations_bring_the_fixed_point_and_the_picture_nearer(pipeline, inverted):
    z_0, few, losses = inverted
    timesteps, empty = ddim_timesteps(pipeline.scheduler, STEPS), per_latent(encode(pipeline, ""), 2)
    many, left = invert(pipeline, z_0, timesteps, dataclasses.replace(CONFIG, iterations=80))
    assert left.mean() < losses.mean() / 10
    unet, schedule = pipeline.unet, make_schedule(pipeline.scheduler)

    def off(z_T):  # how far the latents that come back are from the picture's
        back = sample_latents(unet.graph, unet.params, schedule, empty, None, z_T, timesteps, 1.0)
        return float(jnp.square(back - z_0).mean())

    assert off(many) < off(few) / 10


def test_latents_found_replay_in_diffusers(tiny, pipeline, images):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    seen = []

    def judge(shown):
        seen.append(shown)
        return np.array([True, False])

    found = attack(pipeline, "star", method="tina", images=images, judge=judge, image_steps=STEPS, **vars(CONFIG))
    assert found.outcomes == [SUCCEEDED, FAILED] and found.prompts == ["", ""]
    assert found.unet_evaluations == pytest.approx(2 * STEPS * (2 + 3 * 2.08))
    pipe = StableDiffusionPipeline.from_pretrained(tiny(**FEWEST), safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    for row in range(2):
        start = torch.from_numpy(found.latents[row : row + 1]).permute(0, 3, 1, 2)
        made = pipe("", latents=start, num_inference_steps=STEPS, guidance_scale=1.0, output_type="np")
        assert np.abs(made.images[0] * 255 - seen[0][row]).max() <= 2


def test_defaults_and_bad_input(pipeline, images):
    config = METHODS["tina"].config()
    assert (config.iterations, config.learning_rate) == (25, 1e-3)
    with pytest.raises(AegisError, match="tina: iterations=0"):
        attack(pipeline, "star", method="tina", images=images, iterations=0)


ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}


@pytest.fixture(scope="module")
def zero_snr(tiny):
    return load_pipeline(tiny(**FEWEST, v_prediction=True, scheduler=ZERO_SNR))


def test_the_first_step_at_zero_terminal_snr_is_inverted(zero_snr, images, monkeypatch):
    """There f(z) = z for every z, by the noise that is predicted."""
    tina = importlib.import_module("aegis_jax.attacks.tina")  # the package has the function by this name
    refine, reached = tina._refine, []

    def recorded(*args, **how):
        reached.append(refine(*args, **how))
        return reached[-1]

    monkeypatch.setattr(tina, "_refine", recorded)
    z_0, timesteps = encode_images(zero_snr, images), ddim_timesteps(zero_snr.scheduler, 4)
    z_T, losses = invert(zero_snr, z_0, timesteps, TINAConfig(iterations=10))
    unet, schedule = zero_snr.unet, make_schedule(zero_snr.scheduler)
    assert schedule.alphas_cumprod[timesteps[0]] == 0
    empty = per_latent(encode(zero_snr, ""), 2)
    back = sample_latents(unet.graph, unet.params, schedule, empty, None, z_T, timesteps, 1.0, last=1)
    np.testing.assert_allclose(back, reached[-1][0], atol=1e-4)  # where the inversion stood before that step
    assert len(reached) == 3 * 10 and losses[-1].max() < 1e-8 and np.abs(z_T - back).max() > 0.1


def test_what_cannot_be_inverted_at_zero_terminal_snr_is_refused(zero_snr, images):
    with pytest.raises(AegisError, match="tina: .* pure noise at timestep 999, and a single step .* take more steps"):
        attack(zero_snr, "star", method="tina", images=images, image_steps=1, iterations=1)
    epsilon = dataclasses.replace(zero_snr, scheduler=zero_snr.scheduler | {"prediction_type": "epsilon"})
    with pytest.raises(AegisError, match="pure noise at timestep 999, where an epsilon prediction says nothing"):
        attack(epsilon, "star", method="tina", images=images, image_steps=2)
    with pytest.raises(
        AegisError, match="tina: .* pure noise at timestep 999, where an epsilon prediction says nothing"
    ):
        invert(epsilon, encode_images(epsilon, images), ddim_timesteps(epsilon.scheduler, 2), CONFIG)
