"""Every setting of AEGIS, ESD and what lies between them, with units and choices; the defaults are those of `paper`.

Plain frozen data, so that a group of settings is hashable and can be a static argument of `jax.jit`.
"""

import dataclasses
import math
from typing import ClassVar

from aegis_jax.erasure import latents, trainable
from aegis_jax.erasure.checks import checking
from aegis_jax.errors import AegisError

USES = ("both", "target", "prompt", "none")
LIVES = ("step", "run")
RULES = ("released", "total", "fixed", "constant", "none")
CONTEXTS = ("none", "erase", "push", "shown")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
CONTEXT_REFRESH = 50  # as the embedded world's pools
STARTS = {"aegis+near-speed": "speed"}  # presets that do not start from theta0


@dataclasses.dataclass(frozen=True)
class SoftConfig:
    """Soft tokens before the concept's own: v of the adversarial erasure target (AET) c' = E([BOS, v, concept, EOS]),
    p of the adversarial prompt c* = E([BOS, p, concept, EOS]) (docs/method.md)."""

    use: str = "both"  # both | target (c* := c_e) | prompt (c' := c_e, "w/o AET") | none (ESD)
    beta: float = 1e-3  # sign step of v, in units of a token embedding's coordinates; 0: none is taken
    gamma: float = 1e-3  # sign step of p, likewise
    life: str = "step"  # step: drawn anew from the vocabulary at every step (`random`) | run: kept (`latest`)
    tokens: int = 1  # m' = k, soft tokens of each
    prefixes: int = 1  # pairs (v, p) per concept, which take turns; aegis+


@dataclasses.dataclass(frozen=True)
class GRPConfig:
    """Gradient regularisation projection: the penalty on theta - theta0 (PR), where it conflicts (DGR)."""

    # released: omega moves by the sign of <g_e, P_before> | total: by that of <g_e + g_r, P_before> | fixed: it stays
    # constant: g_e + omega g_r without a conflict test ("w/o DGR") | none: lambda := 0 ("no GRP")
    rule: str = "released"
    omega: float = 0.0  # of every tensor: where it starts, what it stays, or the constant lambda
    mu: float = 0.1  # change of omega per step
    cap: float = 1.0  # largest omega


@dataclasses.dataclass(frozen=True)
class WordsConfig:
    """Prompts of random words (words.py, context.py); aegis+."""

    preserve: float = 0.0  # weight of L_p, that they draw what they drew, beside L_e
    # none | erase: every other latent is erased from the concept among such words | push: and, late in a run, pushed
    # away there the harder the more of it is left | shown: and on trajectories of such prompts, pushed away from where
    # they show it (shown.py)
    context: str = "none"

    # near.py
    near: ClassVar[float] = 0.0  # share of the prompts with words that are one of the concept's nearest
    power: ClassVar[float] = 0.0  # the odds of all other words are what the UNet draws for them to this power


@dataclasses.dataclass(frozen=True)
class DrawnWordsConfig(WordsConfig):
    """Every other prompt that has words is one of the words nearest to the concept; others are drawn the more often the
    more they draw."""

    near: ClassVar[float] = 0.5
    power: ClassVar[float] = 3.0


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Where the latents z_t come from (latents.py)."""

    steps: int = 50  # DDIM steps of a whole trajectory
    # 1: a new trajectory each step (faithful); R > 1: from a pool of whole ones, a concept's redrawn after R batches
    # of its latents
    refresh_every: int = 1
    shared: bool = False  # one latent, drawn under c_e, for the sign steps and the loss; else the loss has its own
    offset: bool = False  # t lies above the latent's own noise level, as in the released sampler

    levels: ClassVar[str] = "interval"  # at which t near its own level a latent is trained (latents.LEVELS)
    by_original: ClassVar[bool] = False  # whose trajectories: the current weights' or the original ones'


@dataclasses.dataclass(frozen=True)
class LatentsOf2025(LatentsConfig):
    """As ESD's code of 2025 draws them."""

    levels: ClassVar[str] = "grid"
    by_original: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class EraseConfig:
    """One erasure run."""

    method: str = "paper"  # the preset that the settings started from (presets.py)
    steps: int = 1000
    batch: int = 1  # latents per step
    seed: int = 0
    learning_rate: float = 1e-5  # of Adam
    eta: float = 1.0  # negative guidance of the erasure target
    trainable: str = "full"  # full | xattn | noxattn | layers | kv
    compute_dtype: str = "auto"  # auto (bfloat16 on accelerators, float32 on CPU) | float32 | bfloat16
    # Recompute in backward passes, in which latents take turns (in_turn.py), and Adam's moments in bfloat16: 10 % more
    # arithmetic, and what a backward pass keeps is that of one latent a device
    low_memory: bool = False
    soft: SoftConfig = SoftConfig()
    grp: GRPConfig = GRPConfig()
    words: WordsConfig = WordsConfig()
    latents: LatentsConfig = LatentsConfig()

    @property
    def start(self) -> str:
        """The closed form (closed/room.py), at its defaults, whose solution the drift starts from; "": from 0."""
        return STARTS.get(self.method, "")

    @property
    def has_target(self) -> bool:
        return self.soft.use in ("both", "target")

    @property
    def has_prompt(self) -> bool:
        return self.soft.use in ("both", "prompt")

    @property
    def moves_v(self) -> bool:
        return self.has_target and self.soft.beta > 0

    @property
    def moves_p(self) -> bool:
        return self.has_prompt and self.soft.gamma > 0

    @property
    def draws_words(self) -> bool:
        return self.words.preserve > 0 or self.words.context != "none"

    @property
    def context_refresh(self) -> int:
        """After how many batches of its latents a concept's trajectories in context (shown.py) are redrawn. Where other
        latents are fresh: of these each would take a whole trajectory, to be judged by its end."""
        return self.latents.refresh_every if self.latents.refresh_every > 1 else CONTEXT_REFRESH

    @property
    def moves_kappa(self) -> bool:
        return self.words.context in ("push", "shown")


def check(config: EraseConfig) -> None:
    """Raises `AegisError` naming every setting that is out of its range."""
    with checking(config) as need:

        def choice(value, key, choices):
            need(value in choices, key, " | ".join(choices))

        soft, grp, words, latents = config.soft, config.grp, config.words, config.latents
        need(config.steps >= 1, "steps", "at least 1")
        need(config.batch >= 1, "batch", "at least 1")
        need(0 <= config.seed < 2**32, "seed", "0 to 2**32 - 1")
        need(0 < config.learning_rate < math.inf, "learning_rate", "a positive number")
        need(math.isfinite(config.eta), "eta", "a finite number")
        # A closed form changes keys and values.
        choice(config.trainable, "trainable", ("full", "xattn", "kv") if config.start else trainable.UNET)
        choice(config.compute_dtype, "compute_dtype", COMPUTE_DTYPES)
        choice(soft.use, "soft.use", USES)
        choice(soft.life, "soft.life", LIVES)
        need(0 <= soft.beta < math.inf, "soft.beta", "0 or more")
        need(0 <= soft.gamma < math.inf, "soft.gamma", "0 or more")
        need(soft.tokens >= 1, "soft.tokens", "at least 1")
        need(soft.prefixes >= 1, "soft.prefixes", "at least 1")
        need(soft.use != "none" or soft.prefixes == 1, "soft.prefixes", "1 where soft.use is none")
        choice(grp.rule, "grp.rule", RULES)
        need(0 <= grp.omega < math.inf, "grp.omega", "0 or more")
        need(grp.rule != "constant" or grp.omega > 0, "grp.omega", "more than 0 where grp.rule is constant")
        need(0 <= grp.mu < math.inf, "grp.mu", "0 or more")
        need(0 < grp.cap < math.inf, "grp.cap", "more than 0")
        need(0 <= words.preserve < math.inf, "words.preserve", "0 or more")
        choice(words.context, "words.context", CONTEXTS)
        need(2 <= latents.steps <= 1000, "latents.steps", "2 to 1000")
        need(latents.refresh_every >= 1, "latents.refresh_every", "1 or more")


def check_concepts(config: EraseConfig, count: int) -> None:
    """Raises `AegisError` if some of `count` concepts would never have a latent."""
    have = config.steps * config.batch
    if have < count:
        raise AegisError(
            f"steps={config.steps} x batch={config.batch} give {have} latents for {count} concepts, so some would "
            "never be erased; take more steps or a larger batch"
        )
    if config.words.context == "shown" and count > latents.MOST_CONCEPTS:
        raise AegisError(
            f"words.context=shown keeps trajectories of every concept, of at most {latents.MOST_CONCEPTS}; {count} are "
            "given: choose words.context=push (aegis+), or erase them in several runs"
        )


def latents_of_concepts(config: EraseConfig, count: int) -> list[int]:
    """How many latents each of `count` concepts has in a run; they are dealt in turn."""
    each, rest = divmod(config.steps * config.batch, count)
    return [each + (i < rest) for i in range(count)]
