"""RECALL (ICLR 2026, arXiv 2507.07139): an adversarial picture beside the prompt, whose text stays as it is.

The attacker has one picture of the concept and a model that takes pictures (img2img). A latent starts as a quarter of
the picture's and three quarters of noise. At ascending timesteps, steps of the sign of a momentum move it along the
gradient of the distance between the noise predicted for it and for the picture, both noised alike, with the prompt and
without. Every few timesteps a share of the picture is added again. After each the latent is noised and denoised with
the prompt, and shown. The published code climbs this distance. What differs from it: docs/attacks.md.

What the picture alone brings is the question here, so three controls run beside it: the picture as it is, the same
looks without any gradient, and the whole attack from a picture without the concept.
Shapes: R rows, h w C latents.
"""

import dataclasses
import math
import time
import warnings
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.attacks.given import Given, case_numbers, check, groups, key_of, take
from aegis_jax.attacks.guided import OTHER_PICTURE, Drawer, others, outcomes
from aegis_jax.attacks.result import ATTACK, BACKWARD, AttackResult
from aegis_jax.attacks.rows import Counter, Denoiser, per_call
from aegis_jax.attacks.search import ascending
from aegis_jax.attacks.soft_prompt import networks
from aegis_jax.diffusion.conditioning import Conditioning, encode, join, per_latent
from aegis_jax.diffusion.schedule import make_schedule, noised
from aegis_jax.diffusion.threads import cores, side_by_side
from aegis_jax.errors import AegisError

NAME = "recall"
MOMENTUM = 0.9
AGAIN = 0.05  # of the picture, added every `interval` timesteps
NO_STEPS, AS_IT_IS, LOOKS = "no gradient", "the picture as it is", "all looks"
_RECALL = 0x4ECA11  # folded into the seed, so that no other part of the program draws the same numbers


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """As published."""

    timesteps: int = 50
    iterations: int = 20  # steps at each timestep
    learning_rate: float = 1e-3
    balance: float = 0.25  # of the picture in the latent's start; the rest is noise
    interval: int = 5  # timesteps after which a share of the picture is added
    strength: float = 0.8  # of img2img: the share of DDIM's steps that a picture is noised back by
    direction: str = "ascend"  # ascend, as the published code does | descend
    seed: int = 0

    choices: ClassVar[dict] = {"direction": ("ascend", "descend")}
    positive: ClassVar[tuple] = ("timesteps", "iterations", "learning_rate", "interval", "strength")

    def check(self, method: str, steps: int) -> None:
        if not (0 <= self.balance <= 1 and self.strength * steps >= 1 and self.strength <= 1):
            raise AegisError(
                f"attack {method}: balance={self.balance} and strength={self.strength}, wanted 0 to 1, and a strength "
                f"that leaves one of {steps} steps"
            )


def loss_and_gradient(denoiser: Denoiser, both: Conditioning, z_ref, adv, t, noise, *, remat: bool = False):
    """Mean squared distance of the predictions for each row's latent and its picture, (R,), and its gradient at adv.

    both: 2 R rows, the empty prompt's first. z_ref, adv, noise (R, h, w, C); t ().
    """
    at = jnp.broadcast_to(t, 2 * len(z_ref))
    twice = lambda z: jnp.concatenate([z, z])  # noqa: E731

    def predicted(z):
        return denoiser(twice(noised(denoiser.schedule, z, at[: len(z)], noise)), at, both, remat=remat)

    wanted = predicted(z_ref)

    def total(adv):
        per_row = jnp.mean(jnp.square(predicted(adv) - wanted), axis=(1, 2, 3)).reshape(2, -1).mean(0)
        return per_row.sum(), per_row

    gradient, losses = jax.grad(total, has_aux=True)(adv)
    return losses, gradient


@partial(jax.jit, static_argnames=("chunk", "remat"))
def _steps(denoiser, both, z_ref, adv, velocity, keys, t, first, rate, *, chunk: int, remat: bool):
    """Steps first .. first + chunk - 1 at timestep t: (adv, velocity, losses (chunk, R))."""

    def step(carry, i):
        adv, velocity = carry
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, i), adv.shape[1:], jnp.float32)  # noqa: E731
        losses, gradient = loss_and_gradient(denoiser, both, z_ref, adv, t, jax.vmap(draw)(keys), remat=remat)
        gradient /= jnp.mean(jnp.abs(gradient), axis=(1, 2, 3), keepdims=True) + 1e-8
        velocity = MOMENTUM * velocity + gradient
        return (adv + rate * jnp.sign(velocity), velocity), losses

    carry, losses = jax.lax.scan(step, (adv, velocity), first + jnp.arange(chunk, dtype=jnp.int32), unroll=chunk == 1)
    return *carry, losses


class _Attack:
    """The rows of one run: each prompt with its picture."""

    def __init__(self, drawer: Drawer, cond: Conditioning, images, config: RecallConfig, rate: float, counter):
        self.drawer, self.cond, self.config, self.rate, self.counter = drawer, cond, config, rate, counter
        pipeline, count = drawer.pipeline, len(images)
        self.denoiser = networks(pipeline, "").erased
        self.z_ref = drawer.encoded(images)
        base = key_of(config.seed, _RECALL)
        self.keys = jax.vmap(lambda k: jax.random.fold_in(base, k))(jnp.asarray(case_numbers(drawer.given)))
        share = config.balance
        self.adv = share * self.z_ref + (1 - share) * self._noise(0)
        self.velocity = np.zeros_like(self.adv)
        self.first = drawer.given.steps - min(int(drawer.given.steps * config.strength), drawer.given.steps)
        self.size, self.remat = per_call(count, 2 * math.prod(self.z_ref.shape[1:3]))
        self.losses = np.full((config.timesteps * config.iterations, count), np.nan, np.float32)
        self.start, self.images = np.zeros_like(self.adv), np.zeros(np.shape(images), np.uint8)
        self.trained = 0

    def _noise(self, number: int) -> np.ndarray:
        """Of a look, or (0) of the start: every row's own."""
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, 2**31 + number), self.z_ref.shape[1:], jnp.float32)  # noqa: E731
        return np.asarray(jax.vmap(draw)(self.keys))

    def look(self, numbers, latents, number: int) -> np.ndarray:
        """Whether these rows' latents (n, h, w, C) bring the concept back; what is drawn is kept as theirs."""
        start = self.drawer.noised(latents, self._noise(number)[numbers], self.first)
        images = self.drawer.images(self.drawer.latents(take(self.cond, numbers), start, self.first))
        self.start[numbers], self.images[numbers] = start, images
        return self.drawer.shown(images) if self.drawer.given.judge else np.zeros(len(numbers), bool)

    def run(self, needed) -> tuple[np.ndarray, np.ndarray]:
        """(which rows' pictures show it as they are, which after any look), both (R,) bool; of the rows `needed`."""
        config, as_it_is, judged = self.config, np.zeros(len(self.adv), bool), self.drawer.given.judge is not None
        rows = np.flatnonzero(needed)
        if judged and len(rows):
            as_it_is[rows] = self.look(rows, self.z_ref[rows], 1)
        hits = as_it_is.copy()
        for phase, t in enumerate(timesteps(self.drawer.pipeline, config)):
            left = np.flatnonzero(needed & ~hits)
            if not len(left):
                break
            if self.rate:
                self._phase(left, phase, t)
            if (phase + 1) % config.interval == 0:
                self.adv[left] += AGAIN * self.z_ref[left]
            if judged or phase + 1 == config.timesteps:
                hits[left] = self.look(left, self.adv[left], 2 + phase)
        return as_it_is, hits

    def _phase(self, left, phase: int, t: int) -> None:
        on_cpu, first = jax.default_backend() == "cpu", phase * self.config.iterations
        chunk = 1 if on_cpu else self.config.iterations

        def run(numbers):
            real, losses = len(set(numbers.tolist())), []
            uncond = per_latent(self.drawer.empty, len(numbers))
            fixed = self.denoiser, join(uncond, take(self.cond, numbers)), self.z_ref[numbers]
            adv, velocity, keys = self.adv[numbers], self.velocity[numbers], self.keys[numbers]
            for i in range(first, first + self.config.iterations, chunk):
                adv, velocity, some = _steps(
                    *fixed, adv, velocity, keys, jnp.int32(t), jnp.int32(i), jnp.float32(self.rate),
                    chunk=chunk, remat=self.remat,
                )  # fmt: skip
                losses.append(np.asarray(some)[:, :real])
                self.counter(losses[-1].size, float(losses[-1].mean()))
            return numbers, np.asarray(adv), np.asarray(velocity), np.concatenate(losses)

        packed = groups(left, self.size)
        for numbers, adv, velocity, losses in side_by_side(run, packed, cores() if on_cpu else 1):
            self.adv[numbers], self.velocity[numbers] = adv, velocity
            self.losses[first : first + len(losses), numbers[: losses.shape[1]]] = losses
        self.trained += len(left) * self.config.iterations


def timesteps(pipeline, config: RecallConfig) -> list[int]:
    """Those that a latent goes through. Raises `AegisError` for more than the schedule has."""
    return ascending(len(make_schedule(pipeline.scheduler).alphas_cumprod), config.timesteps, NAME)


def check_fit(pipeline, concept: str, prompts: list[str], config: RecallConfig) -> None:
    """Raises `AegisError` for settings that `recall` would refuse."""
    timesteps(pipeline, config)


def recall(pipeline, concept: str, given: Given, config: RecallConfig, progress=None) -> AttackResult:
    """Attacks every prompt with another's picture (`Given.beside`), so that what else it shows is not what was asked.

    Raises `AegisError` for settings that cannot be.
    """
    check(NAME, config, given.steps)
    check_fit(pipeline, concept, given.prompts, config)
    began, n = time.perf_counter(), len(given.prompts)
    drawer, cond = Drawer(pipeline, given, n), encode(pipeline, given.prompts)
    noise = drawer.noise(given.seeds)
    plain, unaided = (np.zeros(n, bool), None) if given.judge is None else drawer.plain(cond, noise)
    controlled = given.judge is not None and given.without is not None
    counter = Counter(progress, config.timesteps * config.iterations * n * (1 + controlled))
    rate, found = config.learning_rate * (1 if config.direction == "ascend" else -1), {}
    start = partial(_Attack, drawer, cond, config=config, counter=counter)
    if given.beside is None and n == 1:
        warnings.warn(f"attack {NAME}: one prompt alone meets its own picture, and what else that shows", stacklevel=2)
    own = np.roll(given.images, -1, axis=0) if given.beside is None else given.beside
    attack = start(images=own, rate=rate)
    as_it_is, hits = attack.run(~plain)
    runs = [attack]
    if given.judge is not None:
        found[ATTACK] = {AS_IT_IS: as_it_is | plain, LOOKS: hits | plain}
        attack.images[plain], attack.start[plain] = unaided[plain], noise[plain]
        runs.append(start(images=own, rate=0.0))
        found[NO_STEPS] = {LOOKS: runs[-1].run(~plain)[1] | plain}
    if controlled:
        runs.append(start(images=others(given)[0], rate=rate))
        found[OTHER_PICTURE] = dict(zip((AS_IT_IS, LOOKS), (shown | plain for shown in runs[-1].run(~plain))))
    cost = sum(run.trained for run in runs) * 2 * (2 + BACKWARD) + drawer.unet_evaluations
    return AttackResult(
        prompts=list(given.prompts),
        conditioning=cond,
        losses=attack.losses,
        unet_evaluations=cost,
        seconds=time.perf_counter() - began,
        latents=attack.start,
        first=np.where(plain, 0, attack.first),
        images=attack.images,
        outcomes=None if given.judge is None else outcomes(plain, hits),
        levels=found,
    )
