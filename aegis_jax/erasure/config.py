"""Every setting of an erasure, with units and choices. The defaults are the paper's where the paper states them.

The classes are plain frozen data, so that a config is hashable and can be a static argument of `jax.jit`.
"""

import dataclasses
import math

from aegis_jax.errors import AegisError

TRAINABLE = ("full", "xattn", "noxattn", "kv")
RETENTION = ("grp", "constant", "none")
SCOPES = ("tensor", "tree")
OMEGA_RULES = ("hypergradient", "linear", "fixed")
SOFT_STARTS = ("random", "mean", "concept")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
MOMENTS_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class AETConfig:
    """Adversarial erasure target (method.md 3.2)."""

    enabled: bool = True  # False: the target is built on the plain concept, c' := c_e ("w/o AET")
    tokens: int = 1  # m', learnable token embeddings
    init: str = "random"  # where they start: random (whole words) | mean (of all words) | concept (its mean token)
    beta: float = 1e-3  # sign step, in units of a token embedding's coordinates
    current_weight: float = 1.0  # of the first term of J; -1 is the repelling reading (diverges)


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Adversarial prompt (method.md 3.3)."""

    enabled: bool = True  # False: c* := c_e ("w/o adversarial prompt")
    tokens: int = 1  # k, learnable token embeddings before the concept
    prefixes: int = 1  # adversarial prompts per concept, each with a c' of its own; latents are dealt to them in turn
    init: str = "random"  # as aet.init
    gamma: float = 1e-3  # sign step, in units of a token embedding's coordinates
    # every other latent: the concept among random words instead of an adversarial prompt; not in the paper (context.py)
    context: bool = False
    context_rate: float = 0.0  # rise per step of the push away in context while all of the concept is left there


@dataclasses.dataclass(frozen=True)
class GRPConfig:
    """Gradient regularisation projection: what keeps everything else (method.md 3.5, 3.6)."""

    retention: str = "grp"  # grp | constant (no conflict test, "w/o DGR") | none (lambda := 0, "w/o PR")
    weight: float = 0.0  # lambda of retention="constant"
    scope: str = "tensor"  # tensor (conflict test and lambda for each) | tree (one of both for all trainable tensors)
    omega: float = 0.0  # projection strength at the start, in [0, 1]; the constant value of omega_rule="fixed"
    omega_rule: str = "hypergradient"  # hypergradient | linear (grows by mu a step, up to 1) | fixed
    omega_per_tensor: bool = False  # one omega for each tensor, moved by its own hypergradient
    mu: float = 1e-2  # change of omega per step
    after_adam: bool = False  # project Adam's update instead of the gradient that enters Adam


@dataclasses.dataclass(frozen=True)
class PreserveConfig:
    """Preservation of what random words draw; not in the paper (words.py)."""

    weight: float = 0.0  # of L_p beside L_e; 0: none, as in the paper
    empty: float = 0.0  # share of the random prompts, these and prompt.context's, that have no word
    # not among the random words, these or prompt.context's: those with a larger cosine to the concept, of encodings
    # less all words' mean
    similar: float = 0.6


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Where z_t comes from (method.md 3.1, 6)."""

    steps: int = 50  # DDIM steps of a whole trajectory
    guidance: float = 3.0  # classifier-free guidance of the trajectory
    # 1: a new trajectory each step (faithful); R > 1: a buffer, a concept's part redrawn after R batches' worth of its
    # latents; 0: never redrawn
    refresh_every: int = 1
    trajectories: int = 8  # size of the buffer; unused when refresh_every is 1


@dataclasses.dataclass(frozen=True)
class EraseConfig:
    """One erasure run."""

    steps: int = 1000
    batch: int = 1  # latents per step
    seed: int = 0
    learning_rate: float = 1e-5  # of Adam
    eta: float = 1.0  # negative guidance of the erasure target
    trainable: str = "full"  # full | xattn | noxattn | kv
    compute_dtype: str = "auto"  # auto (bfloat16 on accelerators, float32 on CPU) | float32 | bfloat16
    moments_dtype: str = "float32"  # what Adam's moments are kept in: float32 | bfloat16 (4 bytes a weight less)
    remat: bool = False  # keep only what enters each block for the backward passes: less memory, 10 % more arithmetic
    aet: AETConfig = AETConfig()
    prompt: PromptConfig = PromptConfig()
    grp: GRPConfig = GRPConfig()
    preserve: PreserveConfig = PreserveConfig()
    latents: LatentsConfig = LatentsConfig()

    @property
    def draws_words(self) -> bool:
        """Whether a step draws prompts of random words (words.py)."""
        return self.preserve.weight > 0 or self.prompt.context

    @property
    def moves_kappa(self) -> bool:
        """Whether the push away from the concept in context follows what is left of it there (context.py)."""
        return self.prompt.context and self.prompt.context_rate > 0


def check(config: EraseConfig) -> None:
    """Raises `AegisError` naming every setting that is out of its range."""
    problems = []

    def need(ok, key, value, want):
        if not ok:
            problems.append(f"{key}={value!r} (want {want})")

    for key in ("steps", "batch"):
        need(getattr(config, key) >= 1, key, getattr(config, key), "at least 1")
    need(0 <= config.seed < 2**32, "seed", config.seed, "0 to 2**32 - 1")
    need(config.learning_rate > 0, "learning_rate", config.learning_rate, "a positive number")
    need(config.trainable in TRAINABLE, "trainable", config.trainable, " | ".join(TRAINABLE))
    need(config.compute_dtype in COMPUTE_DTYPES, "compute_dtype", config.compute_dtype, " | ".join(COMPUTE_DTYPES))
    need(config.moments_dtype in MOMENTS_DTYPES, "moments_dtype", config.moments_dtype, " | ".join(MOMENTS_DTYPES))
    need(config.aet.tokens >= 1, "aet.tokens", config.aet.tokens, "at least 1")
    need(config.aet.init in SOFT_STARTS, "aet.init", config.aet.init, " | ".join(SOFT_STARTS))
    need(config.aet.beta >= 0, "aet.beta", config.aet.beta, "0 or more")
    need(config.prompt.tokens >= 1, "prompt.tokens", config.prompt.tokens, "at least 1")
    need(config.prompt.prefixes >= 1, "prompt.prefixes", config.prompt.prefixes, "at least 1")
    need(
        config.prompt.enabled or config.prompt.prefixes == 1,
        "prompt.prefixes",
        config.prompt.prefixes,
        "1 without an adversarial prompt",
    )
    need(config.prompt.init in SOFT_STARTS, "prompt.init", config.prompt.init, " | ".join(SOFT_STARTS))
    need(config.prompt.gamma >= 0, "prompt.gamma", config.prompt.gamma, "0 or more")
    need(config.prompt.context_rate >= 0, "prompt.context_rate", config.prompt.context_rate, "0 or more")
    need(
        config.prompt.context or not config.prompt.context_rate,
        "prompt.context_rate",
        config.prompt.context_rate,
        "0 without prompt.context",
    )
    grp = config.grp
    need(grp.retention in RETENTION, "grp.retention", grp.retention, " | ".join(RETENTION))
    need(grp.scope in SCOPES, "grp.scope", grp.scope, " | ".join(SCOPES))
    if grp.scope == "tree":
        want = 'false with grp.scope="tree", which has one lambda for all tensors'
        need(not grp.omega_per_tensor, "grp.omega_per_tensor", grp.omega_per_tensor, want)
    need(grp.omega_rule in OMEGA_RULES, "grp.omega_rule", grp.omega_rule, " | ".join(OMEGA_RULES))
    need(0 <= grp.omega <= 1, "grp.omega", grp.omega, "0 to 1")
    need(grp.mu >= 0, "grp.mu", grp.mu, "0 or more")
    need(grp.weight >= 0, "grp.weight", grp.weight, "0 or more")
    constant = grp.retention == "constant"
    need(not constant or grp.weight > 0, "grp.weight", grp.weight, 'more than 0 with grp.retention="constant"')
    preserve = config.preserve
    need(preserve.weight >= 0, "preserve.weight", preserve.weight, "0 or more")
    need(0 <= preserve.empty <= 1, "preserve.empty", preserve.empty, "0 to 1")
    need(-1 <= preserve.similar <= 1, "preserve.similar", preserve.similar, "-1 to 1")
    latents = config.latents
    for key, value in (
        ("learning_rate", config.learning_rate),
        ("eta", config.eta),
        ("aet.beta", config.aet.beta),
        ("aet.current_weight", config.aet.current_weight),
        ("prompt.gamma", config.prompt.gamma),
        ("prompt.context_rate", config.prompt.context_rate),
        ("preserve.weight", preserve.weight),
        ("latents.guidance", latents.guidance),
    ):
        need(math.isfinite(value), key, value, "a finite number")
    need(1 <= latents.steps <= 1000, "latents.steps", latents.steps, "1 to 1000")
    need(latents.refresh_every >= 0, "latents.refresh_every", latents.refresh_every, "0 or more")
    need(latents.trajectories >= 1, "latents.trajectories", latents.trajectories, "at least 1")
    if problems:
        raise AegisError("config: " + "; ".join(problems))
