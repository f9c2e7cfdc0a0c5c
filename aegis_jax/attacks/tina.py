"""TINA, text-free inversion (CVPR 2026): the start noise from which the erased model draws a picture without any text.

From the picture's latents DDIM is run backwards with the empty prompt. A step from z_s up to z_t is exact where z_t is
a fixed point of f(z_t) = DDIM from z_s to t with the noise predicted at z_t. It starts at f with the noise predicted at
z_s, and AdamW steps then lower |f(z_t) - z_t|^2. The noise found is denoised with the empty prompt. An erasure tied to
words leaves this ability as it was. What our source leaves open: docs/attacks.md.

At zero terminal SNR (a_T = 0) z_T is its own noise, so that f(z_T) = z_T whatever it is. There the step goes by the
picture that the network predicts at z_T, which is -v: z_T = (z_s + sqrt(a_s) v(z_T)) / sqrt(1 - a_s), just iterated.
Shapes: R pictures, h w C latents.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aegis_jax.attacks.given import Given, check, groups
from aegis_jax.attacks.images import encode_images
from aegis_jax.attacks.result import BACKWARD, FAILED, SUCCEEDED, AttackResult
from aegis_jax.attacks.rows import Counter, per_call
from aegis_jax.attacks.soft_prompt import networks
from aegis_jax.diffusion import predict
from aegis_jax.diffusion.conditioning import encode, per_latent
from aegis_jax.diffusion.sample import generate
from aegis_jax.diffusion.schedule import ddim_step, ddim_timesteps, make_schedule, to_original
from aegis_jax.diffusion.threads import cores, side_by_side
from aegis_jax.errors import AegisError

NAME = "tina"


@dataclass(frozen=True)
class TINAConfig:
    """As published; DDIM's steps are those of the pictures that come out."""

    iterations: int = 25  # K, of AdamW at each step of DDIM
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2  # PyTorch's default

    positive: ClassVar[tuple] = ("iterations", "learning_rate")


def inverted(denoiser, z_s, z_t, t, s, empty, *, remat: bool = False):
    """f(z_t): what z_t would have to be for DDIM to lead from it to z_s, by the noise predicted at z_t, t."""
    eps = denoiser(z_t, jnp.broadcast_to(t, len(z_t)), empty, remat=remat)
    return ddim_step(denoiser.schedule, eps, z_s, s, t)


@partial(jax.jit, static_argnames=("chunk", "rate", "remat"))
def _refine(denoiser, empty, z_s, z_t, moments, t, s, *, chunk: int, rate: tuple, remat: bool):
    """`chunk` steps of AdamW on |f(z_t) - z_t|^2: (z_t, moments, losses (chunk, R))."""

    def total(z_t):
        apart = inverted(denoiser, z_s, z_t, t, s, empty, remat=remat) - z_t
        per_row = jnp.mean(jnp.square(apart), axis=(1, 2, 3))
        return per_row.sum(), per_row

    def step(carry, _):
        z_t, moments = carry
        gradient, losses = jax.grad(total, has_aux=True)(z_t)
        update, moments = _optimiser(rate).update(gradient, moments, z_t)
        return (optax.apply_updates(z_t, update), moments), losses

    (z_t, moments), losses = jax.lax.scan(step, (z_t, moments), length=chunk, unroll=chunk == 1)
    return z_t, moments, losses


@jax.jit
def _of_noise(denoiser, empty, z_s, z_t, t, s):
    """(What z_t at a_t = 0 would have to be, by the picture predicted at it; how far off it is, squared, (R,))."""
    output = predict.output(denoiser.graph, denoiser.params, z_t, jnp.broadcast_to(t, len(z_t)), empty)
    a = denoiser.schedule.alphas_cumprod[s]
    found = (z_s - jnp.sqrt(a) * to_original(denoiser.schedule, output, z_t, t)) / jnp.sqrt(1 - a)
    return found, jnp.mean(jnp.square(found - z_t), axis=(1, 2, 3))


def _optimiser(rate: tuple[float, float]):
    """AdamW of (learning rate, weight decay)."""
    return optax.adamw(rate[0], weight_decay=rate[1])


_first_guess = jax.jit(inverted)


def invert(pipeline, z_0, timesteps, config: TINAConfig, progress=None):
    """(start noise (R, h, w, C), |f(z_t) - z_t|^2 before the last iteration of every step of DDIM (steps, R))."""
    on_cpu, denoiser = jax.default_backend() == "cpu", networks(pipeline, "").erased
    empty = encode(pipeline, "")
    size, remat = per_call(len(z_0), math.prod(z_0.shape[1:3]))
    rate, chunk = (config.learning_rate, config.weight_decay), 1 if on_cpu else config.iterations
    refine = partial(_refine, denoiser, empty, chunk=chunk, rate=rate, remat=remat)
    stride = len(denoiser.schedule.alphas_cumprod) // len(timesteps)
    counter = Counter(progress, len(z_0) * len(timesteps) * config.iterations)
    begins_in_noise = _begins_in_noise(denoiser.schedule, timesteps)

    def refined(z_s, t, s, real):
        z = _first_guess(denoiser, z_s, z_s, t, s, empty)
        moments = _optimiser(rate).init(z)
        for _ in range(0, config.iterations, chunk):
            z, moments, losses = refine(z_s, z, moments, t, s)
            counter(chunk * real, float(losses[-1, :real].mean()))
        return z, losses[-1]

    def iterated(z_s, t, s, real):
        z, _ = _of_noise(denoiser, empty, z_s, z_s, t, s)
        for _ in range(config.iterations):
            z, losses = _of_noise(denoiser, empty, z_s, z, t, s)
            counter(real, float(losses[:real].mean()))
        return z, losses

    def run(numbers):
        z, real, history = z_0[numbers], len(set(numbers.tolist())), []
        for t in timesteps[::-1].tolist():
            up = iterated if begins_in_noise and t == timesteps[0] else refined
            z, losses = up(z, jnp.int32(t), jnp.int32(t - stride), real)
            history.append(np.asarray(losses)[:real])
        return np.asarray(z[:real]), np.stack(history)

    found, losses = zip(*side_by_side(run, groups(np.arange(len(z_0)), size), cores() if on_cpu else 1))
    return np.concatenate(found), np.concatenate(losses, axis=1)


def _begins_in_noise(schedule, timesteps) -> bool:
    """Whether DDIM begins where a_t = 0. Raises `AegisError` where that step cannot be inverted."""
    if schedule.alphas_cumprod[timesteps[0]] > 0:
        return False
    begins = f"attack {NAME}: DDIM begins with pure noise at timestep {timesteps[0]}"
    if schedule.prediction_type == "epsilon":
        raise AegisError(f"{begins}, where an epsilon prediction says nothing; take a v_prediction model")
    if len(timesteps) == 1:  # z_s is the picture predicted then, and z_T has next to no share in it
        raise AegisError(f"{begins}, and a single step to the picture cannot be inverted; take more steps")
    return True


def tina(pipeline, concept: str, given: Given, config: TINAConfig, progress=None) -> AttackResult:
    """Inverts every picture of `given` and, where there is a judge, shows it what comes back."""
    check(NAME, config, given.steps)
    began = time.perf_counter()
    timesteps = ddim_timesteps(pipeline.scheduler, given.steps)
    latents, losses = invert(pipeline, encode_images(pipeline, given.images), timesteps, config, progress)
    cond = per_latent(encode(pipeline, ""), len(latents))
    evaluations, outcomes = given.steps * (1 + config.iterations * (1 + BACKWARD)), None
    if _begins_in_noise(make_schedule(pipeline.scheduler), timesteps):
        evaluations -= config.iterations * BACKWARD  # of the step without a gradient
    if given.judge is not None:
        shown = given.judge(generate(pipeline, cond, None, jnp.asarray(latents), timesteps, 1.0))
        outcomes = [SUCCEEDED if hit else FAILED for hit in shown]
        evaluations += given.steps
    return AttackResult(
        prompts=[""] * len(latents),
        conditioning=cond,
        losses=losses,
        unet_evaluations=len(latents) * evaluations,
        seconds=time.perf_counter() - began,
        latents=latents,
        outcomes=outcomes,
    )
