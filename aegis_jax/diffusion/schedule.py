"""The noise schedule and one step of deterministic DDIM.

z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps with a_t = `alphas_cumprod[t]`, t = 0..T-1. DDIM (Song et
al. 2021, equation 12 with sigma = 0) recovers z_0 from the network's output and moves it to the
noise level of the next timestep.

Whatever sampler a scheduler_config.json names, it is read as a diffusers StableDiffusionPipeline with
`DDIMScheduler.from_config(config)` reads it: known keys are taken, absent ones get DDIM's own defaults, keys of other
samplers are ignored. Two keys have no say, because that pipeline's constructor overrides them: latents are never
clipped (`clip_sample`; they are no pixels, and the files of most samplers do not mention it), and leading timesteps
are counted from 1 (`steps_offset`).
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax import kinds
from aegis_jax.errors import AegisError

DDIM_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "set_alpha_to_one": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
_KINDS = {
    **dict.fromkeys(("beta_start", "beta_end"), kinds.SHARE),
    **dict.fromkeys(("beta_schedule", "prediction_type", "timestep_spacing"), kinds.NAME),
    **dict.fromkeys(("set_alpha_to_one", "thresholding", "rescale_betas_zero_snr"), kinds.FLAG),
    "trained_betas": kinds.optional(kinds.each(kinds.SHARE)),
    "num_train_timesteps": kinds.SIZE,
}
STEPS_OFFSET = 1
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Samplers of models whose noise is the z_t above. With any other (flow matching, EDM) DDIM would
# run and produce nonsense.
SAMPLERS = frozenset(
    name + "Scheduler"
    for name in (
        "DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep "
        "DPMSolverMultistepInverse DPMSolverSDE DPMSolverSinglestep EulerAncestralDiscrete "
        "EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM "
        "SASolver TCD UniPCMultistep"
    ).split()
)


def ddim_config(scheduler_config: dict) -> dict:
    """The keys of DDIM_DEFAULTS as a StableDiffusionPipeline with a DDIMScheduler of this config has them.

    Raises AegisError naming the key for every value that cannot be honoured.
    """
    name = str(scheduler_config.get("_class_name", "DDIMScheduler"))
    if name not in SAMPLERS or scheduler_config.get("use_flow_sigmas"):
        found = "use_flow_sigmas = true" if name in SAMPLERS else f"_class_name = {name!r}"
        raise AegisError(
            f"scheduler_config.json: {found} is not a DDPM noise schedule that DDIM can sample; "
            "use a Stable Diffusion 1.x or 2.x pipeline"
        )
    config = {key: scheduler_config.get(key, default) for key, default in DDIM_DEFAULTS.items()}
    malformed = kinds.problems(config, _KINDS)
    if malformed:
        raise AegisError(f"scheduler_config.json: {'; '.join(malformed)}")
    problems = []
    if config["prediction_type"] not in PREDICTION_TYPES:
        problems.append(("prediction_type", f"one of {', '.join(PREDICTION_TYPES)}"))
    if config["thresholding"]:
        problems.append(("thresholding", "false (dynamic thresholding does not suit latents)"))
    if config["timestep_spacing"] not in ("leading", "trailing", "linspace"):
        problems.append(("timestep_spacing", "leading, trailing or linspace"))
    if config["trained_betas"] is None and config["beta_schedule"] not in _BETAS:
        problems.append(("beta_schedule", f"one of {', '.join(_BETAS)}"))
    if not 2 <= config["num_train_timesteps"] <= 10**6:
        problems.append(("num_train_timesteps", "a whole number from 2 to 1000000"))
    if problems:
        found = "; ".join(f"{key} = {config[key]!r}, wanted {want}" for key, want in problems)
        raise AegisError(f"scheduler_config.json: {found}")
    return config


def _is_integer(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """float32 steps counted from the nearer end and rounded once, as torch.linspace does."""
    start, end = np.float32(start), np.float32(end)
    step = np.float64((end - start) / np.float32(count - 1))
    i = np.arange(count)
    nearer = np.where(i < count // 2, start + step * i, end - step * (count - 1 - i))
    return nearer.astype(np.float32)


def _cosine_betas(config: dict) -> np.ndarray:
    def alpha_bar(fraction):
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    count = config["num_train_timesteps"]
    ratios = (alpha_bar((i + 1) / count) / alpha_bar(i / count) for i in range(count))
    return np.array([min(1 - ratio, 0.999) for ratio in ratios], np.float32)


_BETAS = {
    "linear": lambda c: _linspace(c["beta_start"], c["beta_end"], c["num_train_timesteps"]),
    "scaled_linear": lambda c: _linspace(c["beta_start"] ** 0.5, c["beta_end"] ** 0.5, c["num_train_timesteps"]) ** 2,
    "squaredcos_cap_v2": _cosine_betas,
}


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(a_t) so that a_{T-1} = 0 (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(_cumprod(1 - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alphas_bar = root**2
    return 1 - np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])


def alphas_cumprod(scheduler_config: dict) -> np.ndarray:
    """a_t for t = 0..T-1, float32 (T,). AegisError for a schedule that is not known."""
    config = ddim_config(scheduler_config)
    if config["trained_betas"] is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
        if betas.shape != (config["num_train_timesteps"],):
            raise AegisError(
                f"scheduler_config.json: trained_betas has shape {betas.shape}, wanted "
                f"({config['num_train_timesteps']},) as num_train_timesteps says"
            )
    else:
        betas = _BETAS[config["beta_schedule"]](config)
    if config["rescale_betas_zero_snr"]:
        betas = _zero_terminal_snr(betas)
    return _cumprod(np.float32(1) - betas)


def ddim_timesteps(scheduler_config: dict, steps: int) -> np.ndarray:
    """The timesteps DDIM visits, descending, int32 (steps,).

    Follows `DDIMScheduler.set_timesteps`, except that for some step counts (61 of 1000, say)
    "trailing" gains an extra timestep of -1 there by rounding; it is left out here.
    AegisError where the schedule has no room for that many steps.
    """
    config = ddim_config(scheduler_config)
    total, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if not _is_integer(steps) or not 1 <= steps <= total:
        raise AegisError(f"steps = {steps!r}, wanted a whole number from 1 to {total}")
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps).round()[::-1]
    elif spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (total // steps) + STEPS_OFFSET
    else:
        timesteps = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    timesteps = timesteps.astype(np.int32)
    if timesteps[0] >= total or timesteps[-1] < 0:
        raise AegisError(
            f"steps = {steps}, counted from timestep {STEPS_OFFSET}, reaches timestep {timesteps[0]}, but the schedule "
            f"ends at {total - 1}; take fewer steps"
        )
    return timesteps


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["alphas_cumprod", "final_alpha_cumprod"],
    meta_fields=["prediction_type"],
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a denoising step needs of a scheduler config; a pytree whose string is static."""

    alphas_cumprod: jax.Array  # (T,) float32
    final_alpha_cumprod: jax.Array  # () a after the last step: 1, or a_0 without set_alpha_to_one
    prediction_type: str  # epsilon | v_prediction | sample


def make_schedule(scheduler_config: dict) -> Schedule:
    """The Schedule of a scheduler_config.json. AegisError as in `ddim_config`."""
    config = ddim_config(scheduler_config)
    alphas = jnp.asarray(alphas_cumprod(scheduler_config))
    return Schedule(
        alphas_cumprod=alphas,
        final_alpha_cumprod=jnp.float32(1) if config["set_alpha_to_one"] else alphas[0],
        prediction_type=config["prediction_type"],
    )


def _alpha(schedule: Schedule, t: jax.Array, ndim: int) -> jax.Array:
    """a_t for t () or (B,), shaped to broadcast against (B, ...) of rank `ndim`; t < 0: the end."""
    t = jnp.asarray(t, jnp.int32)
    visited = schedule.alphas_cumprod[jnp.maximum(t, 0)]
    alpha = jnp.where(t >= 0, visited, schedule.final_alpha_cumprod)
    return alpha.reshape(alpha.shape + (1,) * (ndim - 1)) if alpha.ndim else alpha


def noised(schedule: Schedule, z_0, t, noise):
    """z_t (B, h, w, C) of pictures z_0 and noise of that shape, at timesteps t (B,)."""
    a = schedule.alphas_cumprod[t][:, None, None, None]
    return jnp.sqrt(a) * z_0 + jnp.sqrt(1 - a) * noise


def to_epsilon(schedule: Schedule, output: jax.Array, z_t: jax.Array, t: jax.Array) -> jax.Array:
    """The noise a network output stands for: output, z_t (B, h, w, C), t () or (B,)."""
    if schedule.prediction_type == "epsilon":
        return output
    a = _alpha(schedule, t, z_t.ndim)
    if schedule.prediction_type == "v_prediction":
        return jnp.sqrt(a) * output + jnp.sqrt(1 - a) * z_t
    return (z_t - jnp.sqrt(a) * output) / jnp.sqrt(1 - a)


def to_original(schedule: Schedule, output: jax.Array, z_t: jax.Array, t: jax.Array) -> jax.Array:
    """The z_0 a network output stands for. Shapes as `to_epsilon`."""
    if schedule.prediction_type == "sample":
        return output
    a = _alpha(schedule, t, z_t.ndim)
    if schedule.prediction_type == "v_prediction":
        return jnp.sqrt(a) * z_t - jnp.sqrt(1 - a) * output
    return (z_t - jnp.sqrt(1 - a) * output) / jnp.sqrt(a)


def output_step(schedule: Schedule, output: jax.Array, z_t: jax.Array, t: jax.Array, t_prev: jax.Array) -> jax.Array:
    """z at t_prev from the raw network output at t; eta 0. t_prev < 0 means the end.

    Unlike `ddim_step` it also holds at zero terminal SNR (a_t = 0), where epsilon alone no longer
    determines z_0.
    """
    z_0 = to_original(schedule, output, z_t, t)
    a_prev = _alpha(schedule, t_prev, z_t.ndim)
    return jnp.sqrt(a_prev) * z_0 + jnp.sqrt(1 - a_prev) * to_epsilon(schedule, output, z_t, t)


def ddim_step(schedule: Schedule, eps: jax.Array, z_t: jax.Array, t: jax.Array, t_prev: jax.Array) -> jax.Array:
    """z at t_prev from epsilon at t, whatever the network predicts; needs a_t > 0.

    See `output_step` for the rest.
    """
    of_epsilon = dataclasses.replace(schedule, prediction_type="epsilon")
    return output_step(of_epsilon, eps, z_t, t, t_prev)


def guide(eps_uncond: jax.Array, eps_cond: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance: eps_uncond + scale (eps_cond - eps_uncond)."""
    return eps_uncond + scale * (eps_cond - eps_uncond)
