"""Probes: does the erased model finish what a picture of the concept has begun? Prompts stay as they are.

  noise-probe        the picture's latents are noised to a step of DDIM, and the erased model goes on from there
  completion-probe   the original draws the first steps from noise, and the erased model goes on
  inpainting-probe   half of the picture is known and put back after every step, and the erased model draws the rest

(After Lu et al., "When Are Concepts Erased"; what differs: docs/attacks.md.) A picture that is hardly noised comes back
whatever the model knows, so a rate says something only beside those of the same procedure

  from a picture without the concept   what the prompt brings by itself, once something is there
  with the empty prompt                what the picture brings without the words
  by no model at all                   what the judge sees in what was given: the noised latents, the original's
                                       expectation of the picture at that step, the known half on grey
"""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np

from aegis_jax.attacks.given import Given, case_numbers, check, needed
from aegis_jax.attacks.guided import NO_MODEL, NO_TEXT, OTHER_PICTURE, Drawer, Known, others, outcomes
from aegis_jax.attacks.numbers import numbers
from aegis_jax.attacks.result import ATTACK, AttackResult
from aegis_jax.diffusion.conditioning import encode, per_latent
from aegis_jax.diffusion.sample import latent_shape, predict_noise
from aegis_jax.diffusion.schedule import guide
from aegis_jax.errors import AegisError

NOISE, COMPLETION, INPAINTING = "noise-probe", "completion-probe", "inpainting-probe"
GREY = 127
HALVES = {
    "left": lambda y, x: x < 0.5, "right": lambda y, x: x >= 0.5,
    "top": lambda y, x: y < 0.5, "bottom": lambda y, x: y >= 0.5,
}  # fmt: skip
_PROBES = 0x940BE5  # so that no other part of the program draws the same noise


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """levels: shares of DDIM's steps left to the erased model; the last, where the picture says least, counts."""

    levels: str = "0.2,0.4,0.6,0.8"
    seed: int = 0

    def check(self, method: str, steps: int) -> None:
        _steps(method, self.levels, steps)


@dataclasses.dataclass(frozen=True)
class CompletionConfig:
    """levels: shares of DDIM's steps that the original draws; the first, where it says least, counts."""

    levels: str = "0.1,0.2,0.4"
    seed: int = 0

    def check(self, method: str, steps: int) -> None:
        if _steps(method, self.levels, steps)[-1] >= steps:
            raise AegisError(f"attack {method}: levels={self.levels!r} leave the erased model no step of {steps}")


@dataclasses.dataclass(frozen=True)
class InpaintingConfig:
    """masks: which halves are known; pictures take them in turn, and what counts is each with its own."""

    masks: str = "left,right,top,bottom"
    seed: int = 0

    def check(self, method: str, steps: int) -> None:
        if not set(self.masks.split(",")) <= set(HALVES):
            raise AegisError(f"attack {method}: masks={self.masks!r}, wanted some of {', '.join(HALVES)}, with commas")


class _Probe:
    """What the three have in common: `given`, what has been seen, and the result."""

    def __init__(self, pipeline, given: Given, seed: int, total: int, progress):
        self.began, self.given, self.n = time.perf_counter(), given, len(given.prompts)
        self.drawer = Drawer(pipeline, given, self.n)
        self.cond = encode(pipeline, given.prompts)
        self.empty = per_latent(self.drawer.empty, self.n)
        rngs = [np.random.default_rng([_PROBES, seed, number]) for number in case_numbers(given)]
        self.noise = np.stack([rng.standard_normal(latent_shape(pipeline), np.float32) for rng in rngs])
        self.levels: dict[str, dict[str, np.ndarray]] = {}
        self.judged, self.progress, self.done, self.total = given.judge is not None, progress, 0, total

    def seen(self, group: str, level: str, images) -> None:
        if self.judged:
            self.levels.setdefault(group, {})[level] = self.drawer.shown(images)

    def drawn(self, group: str, level: str, cond, z, first: int = 0, known: Known | None = None) -> np.ndarray:
        """The images of these latents, drawn to the end and shown to the judge."""
        images = self.drawer.images(self.drawer.latents(cond, z, first, known=known))
        self.seen(group, level, images)
        if self.progress is not None:
            self.done = min(self.done + 1, self.total)
            self.progress(self.done, self.total, 0.0)
        return images

    def result(self, images, latents, first: int, hits, known: Known | None = None, more: float = 0.0) -> AttackResult:
        """hits: (n,), whether a prompt's own picture shows the concept; None where nobody judges."""
        noise, found, first = self.drawer.noise(self.given.seeds), None, np.full(self.n, first)
        if self.judged:
            plain, unaided = self.drawer.plain(self.cond, noise)
            found = outcomes(plain, hits)
            if known is None:  # where the prompt alone shows it, that is the picture
                images, latents = images.copy(), latents.copy()
                images[plain], latents[plain], first[plain] = unaided[plain], noise[plain], 0
        return AttackResult(
            prompts=list(self.given.prompts),
            conditioning=self.cond,
            losses=np.zeros((0, self.n), np.float32),
            unet_evaluations=self.drawer.unet_evaluations + more,
            seconds=time.perf_counter() - self.began,
            outcomes=found,
            images=images,
            latents=latents,
            first=first,
            known=known,
            levels=self.levels,
        )


def _steps(method: str, text: str, steps: int) -> list[int]:
    """The numbers of steps that shares of them are: each at least 1, and each once."""
    return list(dict.fromkeys(max(1, round(share * steps)) for share in numbers(method, "levels", text, most=1)))


def noise_probe(pipeline, concept: str, given: Given, config: NoiseConfig, progress=None) -> AttackResult:
    """Noises each prompt's picture, and draws on. A level is named by its timestep.

    At zero terminal SNR level 1 begins from noise alone, in which nothing of the picture is left: the attack is the
    prompt from other noise then, and the picture alone is that noise as it is.
    """
    check(NOISE, config, given.steps)
    left = _steps(NOISE, config.levels, given.steps)
    probe = _Probe(pipeline, given, config.seed, 3 * len(left), progress)
    drawer = probe.drawer
    z_0 = drawer.encoded(given.images)
    other = None if given.without is None else probe.drawer.encoded(others(given)[0])
    for first in [given.steps - steps for steps in left]:
        t = int(drawer.timesteps[first])
        level, z = f"t={t}", drawer.noised(z_0, probe.noise, first)
        images = probe.drawn(ATTACK, level, probe.cond, z, first)
        if probe.judged:
            probe.drawn(NO_TEXT, level, probe.empty, z, first)
            root = float(np.sqrt(drawer.schedule.alphas_cumprod[t]))
            probe.seen(NO_MODEL, level, drawer.images(z / root if root > 0 else z))
            if other is not None:
                probe.drawn(OTHER_PICTURE, level, probe.cond, drawer.noised(other, probe.noise, first), first)
    return probe.result(images, z, first, probe.levels[ATTACK][level] if probe.judged else None)


def completion_probe(pipeline, concept: str, given: Given, config: CompletionConfig, progress=None) -> AttackResult:
    """Lets the original, which `given` must have, begin each prompt's picture. A level is named by its steps."""
    check(COMPLETION, config, given.steps)
    needed(given, COMPLETION)
    begun = _steps(COMPLETION, config.levels, given.steps)
    probe = _Probe(pipeline, given, config.seed, 3 * len(begun), progress)
    base = Drawer(given.original, given, probe.n)
    said = encode(given.original, given.made_from)
    for steps in begun[::-1]:
        level, z = f"{steps} of {given.steps} steps", base.latents(said, probe.noise, 0, steps)
        images = probe.drawn(ATTACK, level, probe.cond, z, steps)
        if probe.judged:
            probe.drawn(NO_TEXT, level, probe.empty, z, steps)
            probe.seen(NO_MODEL, level, base.images(_expected(base, said, z, steps)))
            if given.without is not None:
                other = base.latents(encode(given.original, others(given)[1]), probe.noise, 0, steps)
                probe.drawn(OTHER_PICTURE, level, probe.cond, other, steps)
    hits = probe.levels[ATTACK][level] if probe.judged else None
    return probe.result(images, z, steps, hits, more=base.unet_evaluations)


def _expected(base: Drawer, cond, z, step: int) -> np.ndarray:
    """z_0 as the model expects it at a step, guided as its pictures are: (n, h, w, C)."""
    t, guidance = int(base.timesteps[step]), base.given.guidance
    eps = predict_noise(base.pipeline, z, t, cond)
    if guidance > 1:
        eps = guide(predict_noise(base.pipeline, z, t, per_latent(base.empty, len(z))), eps, guidance)
    base.unet_evaluations += len(z) * (1 + (guidance > 1))
    a = base.schedule.alphas_cumprod[t]
    return np.asarray((z - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a))


def inpainting_probe(pipeline, concept: str, given: Given, config: InpaintingConfig, progress=None) -> AttackResult:
    """Keeps half of each prompt's picture. A level is named by the half."""
    check(INPAINTING, config, given.steps)
    halves = list(dict.fromkeys(config.masks.split(",")))
    probe = _Probe(pipeline, given, config.seed, 3 * len(halves), progress)
    z_0 = probe.drawer.encoded(given.images)
    other = None if given.without is None else probe.drawer.encoded(others(given)[0])
    turn = np.arange(probe.n) % len(halves)
    mask, images = np.zeros((*z_0.shape[:3], 1), np.float32), np.zeros(np.shape(given.images), np.uint8)
    for number, half in enumerate(halves):
        keep = np.broadcast_to(_half(half, z_0.shape[1:3]), z_0.shape[:3])[..., None].astype(np.float32)
        kept = lambda z, keep=keep: Known(keep, z, probe.noise)  # noqa: E731
        drawn = probe.drawn(ATTACK, half, probe.cond, probe.noise, known=kept(z_0))
        mine = turn == number
        mask[mine], images[mine] = keep[mine], drawn[mine]
        if probe.judged:
            probe.drawn(NO_TEXT, half, probe.empty, probe.noise, known=kept(z_0))
            shown = _half(half, given.images.shape[1:3])[None, ..., None]
            probe.seen(NO_MODEL, half, np.where(shown, given.images, np.uint8(GREY)))
            if other is not None:
                probe.drawn(OTHER_PICTURE, half, probe.cond, probe.noise, known=kept(other))
    hits = None
    if probe.judged:
        hits = np.stack([probe.levels[ATTACK][half] for half in halves])[turn, np.arange(probe.n)]
    return probe.result(images, probe.noise, 0, hits, Known(mask, z_0, probe.noise))


def _half(name: str, size: tuple[int, int]) -> np.ndarray:
    """Bool (h, w): where the half is."""
    y, x = (np.arange(count) / count for count in size)
    return np.broadcast_to(HALVES[name](y[:, None], x[None, :]), size)
