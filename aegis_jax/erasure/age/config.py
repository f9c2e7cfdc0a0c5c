"""AGE's settings; the defaults are those of the published command for objects (docs/method.md)."""

import dataclasses
import math

from aegis_jax.erasure import trainable
from aegis_jax.erasure.checks import checking

FORMS = ("hard", "soft")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """What the concept is to become: a mixture of words, of which an adversary chooses the worst kept."""

    words: tuple[str, ...] = ()  # texts to choose from; (): whole words of the tokenizer
    nearest: int = 1000  # of these, so many of the concept's nearest
    centres: int = 100  # of those, one from each of so many clusters; fewer: all of them
    learning_rate: float = 1e-2  # of Adam on the words' logits pi
    temperature: float = 0.1  # of the Gumbel softmax; published: 2 for nudity and artists
    form: str = "hard"  # hard: one text, straight-through | soft: the `top` likeliest, mixed
    top: int = 5
    weight: float = 1.0  # of L_p, that theta draws the target as theta0 does


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Where the latents z_t of the concept come from (erasure/latents.py); those of its target are drawn afresh."""

    steps: int = 50  # DDIM steps of a whole trajectory
    refresh_every: int = 1  # 1: a new trajectory for every draw | R > 1: from a pool, redrawn after R steps


@dataclasses.dataclass(frozen=True)
class AgeConfig:
    """One erasure run."""

    method: str = "age"
    steps: int = 1000  # each one of theta and one of pi
    batch: int = 1  # latents per step, of the concept and of its target each
    seed: int = 0
    learning_rate: float = 1e-5  # of Adam on theta
    eta: float = 1.0  # negative guidance of the erasure target
    trainable: str = "xattn"  # full | xattn | noxattn | layers | kv; published: noxattn for nudity
    compute_dtype: str = "auto"  # auto (bfloat16 on accelerators, float32 on CPU) | float32 | bfloat16
    low_memory: bool = False  # recompute in backward passes, Adam's moments in bfloat16
    target: TargetConfig = TargetConfig()
    latents: LatentsConfig = LatentsConfig()


def check(config: AgeConfig) -> None:
    """Raises `AegisError` naming every setting that is out of its range."""
    with checking(config) as need:
        target, latents = config.target, config.latents
        need(config.steps >= 1, "steps", "at least 1")
        need(config.batch >= 1, "batch", "at least 1")
        need(0 <= config.seed < 2**32, "seed", "0 to 2**32 - 1")
        need(0 < config.learning_rate < math.inf, "learning_rate", "a positive number")
        need(math.isfinite(config.eta), "eta", "a finite number")
        need(config.trainable in trainable.UNET, "trainable", " | ".join(trainable.UNET))
        need(config.compute_dtype in COMPUTE_DTYPES, "compute_dtype", " | ".join(COMPUTE_DTYPES))
        need(target.nearest >= 2, "target.nearest", "at least 2")
        need(target.centres >= 2, "target.centres", "at least 2")
        need(0 < target.learning_rate < math.inf, "target.learning_rate", "a positive number")
        need(0 < target.temperature < math.inf, "target.temperature", "a positive number")
        need(target.form in FORMS, "target.form", " | ".join(FORMS))
        need(target.top >= 1, "target.top", "at least 1")
        need(0 <= target.weight < math.inf, "target.weight", "0 or more")
        need(2 <= latents.steps <= 1000, "latents.steps", "2 to 1000")
        need(latents.refresh_every >= 1, "latents.refresh_every", "1 or more")
