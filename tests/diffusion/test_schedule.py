"""The schedule against diffusers' DDIMScheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aegis_jax.diffusion import schedule as lib
from aegis_jax.errors import AegisError

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

SD14 = {
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
SD21 = {**SD14, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
BETAS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.geomspace(1e-4, 0.02, 1000).tolist(), "beta_schedule": "of no use"},
    {"beta_schedule": "linear", "num_train_timesteps": 77, "beta_end": 0.2},
]


@pytest.fixture(autouse=True)
def quiet_diffusers(recwarn):
    """diffusers announces in a FutureWarning what its pipeline's constructor overrides."""


def reference(config):
    """The DDIM scheduler of a config.json as it is inside a StableDiffusionPipeline, whose constructor mends it."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        **parts, scheduler=diffusers.DDIMScheduler.from_config(dict(config)), requires_safety_checker=False
    ).scheduler


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", BETAS, ids=lambda b: "-".join(map(str, b))[:40])
def test_alphas_match_diffusers(betas, zero_snr):
    config = {**betas, "rescale_betas_zero_snr": zero_snr}
    wanted = reference(config).alphas_cumprod.numpy()
    found = lib.alphas_cumprod(config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=1e-9)
    if zero_snr:
        assert found[-1] == wanted[-1] == 0


def test_sd14_alphas_are_the_published_ones():
    found = lib.alphas_cumprod(SD14)
    np.testing.assert_allclose(found[[0, 999]], [0.99915, 0.00466], rtol=1e-3)
    wanted = reference(SD14).alphas_cumprod.numpy()
    # The same bits where torch's kernels fuse multiply and add.
    np.testing.assert_allclose(found, wanted, rtol=2e-7)


SPACINGS = ["leading", "trailing", "linspace"]


@given(
    total=st.integers(2, 1000),
    share=st.floats(0, 1),
    spacing=st.sampled_from(SPACINGS),
    offset=st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_timesteps_match_diffusers(total, share, spacing, offset):
    steps = max(1, round(share * total))
    config = {
        "num_train_timesteps": total,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "trained_betas": [0.01] * total,
    }
    scheduler = reference(config)
    scheduler.set_timesteps(steps)
    wanted = scheduler.timesteps.numpy()
    if wanted.max() >= total:
        with pytest.raises(AegisError, match="counted from timestep 1.*take fewer"):
            lib.ddim_timesteps(config, steps)
        return
    # diffusers' rounding sometimes adds a timestep of -1 after the last one: not part of ours.
    wanted = wanted[wanted >= 0]
    found = lib.ddim_timesteps(config, steps)
    assert found.shape == (steps,) and found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("prediction_type", lib.PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("clip_sample", [False, True, None], ids=["not_clipping", "clipping", "unsaid"])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_every_step_matches_diffusers(prediction_type, spacing, clip_sample, set_alpha_to_one):
    """Each step of a short run from fresh z and output, with zero terminal SNR where possible."""
    config = {
        **SD14,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "clip_sample_range": 1.25,
        "set_alpha_to_one": set_alpha_to_one,
        "rescale_betas_zero_snr": prediction_type != "epsilon",
    }
    config.pop("clip_sample")
    config |= {} if clip_sample is None else {"clip_sample": clip_sample}
    scheduler, schedule = reference(config), lib.make_schedule(config)
    steps = 7
    scheduler.set_timesteps(steps)
    generator = np.random.default_rng(3)
    for t in lib.ddim_timesteps(config, steps).tolist():
        z, output = generator.standard_normal((2, 2, 3, 3, 4), np.float32)
        wanted = scheduler.step(torch.from_numpy(output), t, torch.from_numpy(z)).prev_sample
        found = lib.output_step(schedule, output, z, t, t - 1000 // steps)
        scale = max(1, float(wanted.abs().max()))
        np.testing.assert_allclose(found, wanted, atol=2e-6 * scale, rtol=2e-5)
        if prediction_type == "epsilon":
            np.testing.assert_array_equal(found, lib.ddim_step(schedule, output, z, t, t - 1000 // steps))


@pytest.mark.parametrize("absent", sorted(lib.DDIM_DEFAULTS))
def test_absent_keys_take_ddims_defaults(absent):
    full = {**SD14, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    full |= {"prediction_type": "v_prediction", "thresholding": False}
    config = {key: value for key, value in full.items() if key != absent}
    for key, value in lib.ddim_config(config).items():
        assert value == reference(config).config[key], key


@given(st.integers(0, 999), st.floats(-3, 3), st.floats(-3, 3))
@settings(deadline=None)
def test_conversions_agree_with_the_definition_of_z_t(t, z_0, eps):
    """v = sqrt(a) eps - sqrt(1-a) z_0 (Salimans and Ho 2022) gives back its eps and z_0."""
    a = float(lib.alphas_cumprod(SD21)[t])
    z_t = a**0.5 * z_0 + (1 - a) ** 0.5 * eps
    velocity = a**0.5 * eps - (1 - a) ** 0.5 * z_0
    schedule = lib.make_schedule(SD21)
    arrays = [jnp.full((1, 1, 1, 1), x, jnp.float32) for x in (velocity, z_t)]
    np.testing.assert_allclose(lib.to_epsilon(schedule, *arrays, t), eps, atol=3e-6)
    np.testing.assert_allclose(lib.to_original(schedule, *arrays, t), z_0, atol=3e-6)


def test_timesteps_may_differ_within_a_batch():
    schedule = lib.make_schedule(SD21)
    z, output = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 4), np.float32)
    t = np.array([1, 400, 999])
    together = lib.output_step(schedule, output, z, t, t - 40)
    for i in range(3):
        alone = lib.output_step(schedule, output[i : i + 1], z[i : i + 1], t[i], t[i] - 40)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)


def test_schedule_is_a_pytree_with_static_strings():
    schedule = lib.make_schedule(SD21)
    leaves, structure = jax.tree.flatten(schedule)
    assert [leaf.shape for leaf in leaves] == [(1000,), ()]
    assert jax.tree.unflatten(structure, leaves).prediction_type == "v_prediction"


@given(st.floats(-20, 20))
@settings(deadline=None)
def test_guidance_is_the_line_through_both_predictions(scale):
    pair = np.random.default_rng(1).standard_normal((2, 5)).astype(np.float32)
    wanted = (1 - scale) * pair[0].astype(np.float64) + scale * pair[1].astype(np.float64)
    np.testing.assert_allclose(lib.guide(*pair, scale), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"thresholding": True}, "thresholding"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"timestep_spacing": "karras"}, "karras"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ],
)
def test_what_cannot_be_honoured_is_named(config, named):
    with pytest.raises(AegisError, match=named):
        lib.make_schedule(config)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, "25"])
def test_impossible_step_counts(steps):
    with pytest.raises(AegisError, match="steps"):
        lib.ddim_timesteps(SD14, steps)
