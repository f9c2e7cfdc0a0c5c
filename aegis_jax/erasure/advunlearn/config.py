"""AdvUnlearn's settings; the defaults are those of the published command for text encoders (docs/method.md)."""

import dataclasses
import math

from aegis_jax.erasure import trainable
from aegis_jax.erasure.checks import checking

RULES = ("adam", "sign")
STARTS = ("random", "latest")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """The adversarial prompt c* = E([BOS, p, concept, EOS]), found anew before every step."""

    steps: int = 30  # each at latents of its own
    learning_rate: float = 1e-3  # in units of a token embedding's coordinates
    rule: str = "adam"  # adam | sign: a step of that size by the gradient's sign
    start: str = "random"  # random: words drawn anew for every attack | latest: what the concept's last one has found
    tokens: int = 1  # k
    warm_up: float = 0.2  # share of the run's steps before the first attack: plain ESD


@dataclasses.dataclass(frozen=True)
class RetainConfig:
    """Prompts that are to draw what they drew."""

    prompts: tuple[str, ...] = ()  # (): a small neutral set (setup.py)
    weight: float = 0.5  # of L_p beside L_e; published: 0.3 for nudity, 0.5 for styles and objects
    batch: int = 5  # prompts of a step, a latent each


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Where the latents z_t come from (erasure/latents.py)."""

    steps: int = 50  # DDIM steps of a whole trajectory
    refresh_every: int = 1  # 1: a new trajectory for every draw | R > 1: from a pool, redrawn after R steps


@dataclasses.dataclass(frozen=True)
class AdvUnlearnConfig:
    """One erasure run."""

    method: str = "advunlearn"
    steps: int = 1000
    batch: int = 1  # latents per step and per step of the attack
    seed: int = 0
    learning_rate: float = 1e-5  # of Adam
    eta: float = 1.0  # negative guidance of the erasure target
    trainable: str = trainable.TEXT_ENCODER  # text_encoder | full | xattn | noxattn | layers | kv, of the UNet
    compute_dtype: str = "auto"  # auto (bfloat16 on accelerators, float32 on CPU) | float32 | bfloat16
    low_memory: bool = False  # recompute in backward passes, Adam's moments in bfloat16
    attack: AttackConfig = AttackConfig()
    retain: RetainConfig = RetainConfig()
    latents: LatentsConfig = LatentsConfig()

    @property
    def warm_up(self) -> int:
        """Steps before the first attack."""
        return round(self.attack.warm_up * self.steps)


def check(config: AdvUnlearnConfig) -> None:
    """Raises `AegisError` naming every setting that is out of its range."""
    with checking(config) as need:
        attack, retain, latents = config.attack, config.retain, config.latents
        need(config.steps >= 1, "steps", "at least 1")
        need(config.batch >= 1, "batch", "at least 1")
        need(0 <= config.seed < 2**32, "seed", "0 to 2**32 - 1")
        need(0 < config.learning_rate < math.inf, "learning_rate", "a positive number")
        need(math.isfinite(config.eta), "eta", "a finite number")
        of_unet = config.method == "advunlearn-unet"
        sets = trainable.UNET if of_unet else (trainable.TEXT_ENCODER, *trainable.UNET)
        need(config.trainable in sets, "trainable", " | ".join(sets))
        need(config.compute_dtype in COMPUTE_DTYPES, "compute_dtype", " | ".join(COMPUTE_DTYPES))
        need(attack.steps >= 1, "attack.steps", "at least 1")
        need(0 < attack.learning_rate < math.inf, "attack.learning_rate", "a positive number")
        need(attack.rule in RULES, "attack.rule", " | ".join(RULES))
        need(attack.start in STARTS, "attack.start", " | ".join(STARTS))
        need(attack.tokens >= 1, "attack.tokens", "at least 1")
        need(0 <= attack.warm_up <= 1, "attack.warm_up", "0 to 1")
        need(0 <= retain.weight < math.inf, "retain.weight", "0 or more")
        need(retain.batch >= 1, "retain.batch", "at least 1")
        need(2 <= latents.steps <= 1000, "latents.steps", "2 to 1000")
        need(latents.refresh_every >= 1, "latents.refresh_every", "1 or more")
