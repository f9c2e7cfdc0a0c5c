"""UnlearnDiffAtk (Zhang et al., ECCV 2024): words in front of the prompt, searched on the simplex over the vocabulary.

MU-Attack's `text_grad`: k rows of probabilities over all tokens, all even at first. Each step draws a token of every
row, takes the denoising loss of the target picture's latents at the phase's timestep with fresh noise, and carries its
gradient straight through to the rows, cut to [-1, 1]; a step of Adam, then the projection onto the simplex. Timesteps
ascend; after each the likeliest tokens are decoded and shown. What differs from the published code: docs/attacks.md.
"""

import dataclasses
from typing import ClassVar

from aegis_jax.attacks import search, spaces
from aegis_jax.attacks.given import Given, check
from aegis_jax.attacks.prompt import INSERTIONS
from aegis_jax.attacks.result import AttackResult
from aegis_jax.errors import AegisError

NAME = "unlearndiffatk"


@dataclasses.dataclass(frozen=True)
class UnlearnDiffAtkConfig:
    """As published; `tokens` is 3 for styles and objects there, 5 for nudity, violence and illegal acts."""

    tokens: int = 5  # k
    place: str = "prefix_k"  # prefix_k | suffix_k | mid_k | insert_k | per_k_words
    timesteps: int = 50
    iterations: int = 40  # steps at each timestep
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    update: str = "adam"  # adam | sign, which has no weight decay
    restarts: int = 1  # of each prompt
    seed: int = 0

    choices: ClassVar[dict] = {"update": spaces.UPDATES}
    positive: ClassVar[tuple] = ("tokens", "timesteps", "iterations", "learning_rate", "restarts")


def unlearndiffatk(pipeline, concept: str, given: Given, config: UnlearnDiffAtkConfig, progress=None) -> AttackResult:
    """Attacks every prompt of `given`. Raises `AegisError` for settings that cannot be."""
    check(NAME, config, given.steps)
    return search.Search(pipeline, given, plan(pipeline, given.prompts, config), progress).run()


def plan(pipeline, prompts: list[str], config: UnlearnDiffAtkConfig) -> search.Plan:
    space = spaces.Simplex(config.learning_rate, config.weight_decay, config.update)
    return phased(NAME, pipeline, prompts, config, space)


def phased(method: str, pipeline, prompts: list[str], config, space, **more) -> search.Plan:
    """MU-Attack's plan: ascending timesteps, the same number of steps at each, a look after it."""
    if config.place == "replace":
        raise AegisError(f"attack {method}: place='replace', wanted one of: {', '.join(INSERTIONS[:-1])}")
    total = pipeline.scheduler.get("num_train_timesteps", 1000)
    return search.Plan(
        method=method,
        space=space,
        tokens=[config.tokens] * len(prompts),
        place=config.place,
        timesteps=search.ascending(total, config.timesteps, method),
        iterations=config.iterations,
        restarts=config.restarts,
        seed=config.seed,
        **more,
    )
