"""P4D (Chin et al., ICML 2024): words whose embeddings stay snapped to the vocabulary, fitted to the original model.

Learnt embeddings start at tokens drawn from the whole vocabulary. Each step takes the token nearest to each by cosine,
the distance from the erased model's prediction for these to the original model's for the original prompt, and moves
the embeddings by the gradient at the tokens. A control's goal is the same, though its prompt does not name the concept.
Three published forms disagree in length, rate, steps and success, so each has its own name:

  p4d-hard-prompt   MU-Attack's `hard_prompt`: k tokens in front of the prompt, Adam, UnlearnDiffAtk's phases
  p4d-n             official: N tokens instead of the prompt, AdamW, timesteps drawn, the best of the looks is kept
  p4d-k             official: one token in front of every three of the prompt's; otherwise as p4d-n

docs/attacks.md says what differs from the published code.
"""

import dataclasses
from typing import ClassVar

from aegis_jax.attacks import search, spaces
from aegis_jax.attacks.given import Given, check, needed
from aegis_jax.attacks.prompt import EVERY
from aegis_jax.attacks.result import AttackResult
from aegis_jax.attacks.unlearndiffatk import phased
from aegis_jax.errors import AegisError

HARD_PROMPT, N, K = "p4d-hard-prompt", "p4d-n", "p4d-k"


@dataclasses.dataclass(frozen=True)
class HardPromptConfig:
    """As published in MU-Attack; `tokens` is 3 for objects there, 5 for nudity."""

    tokens: int = 5
    place: str = "prefix_k"
    timesteps: int = 50
    iterations: int = 40
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    restarts: int = 1
    seed: int = 0

    positive: ClassVar[tuple] = ("tokens", "timesteps", "iterations", "learning_rate", "restarts")


@dataclasses.dataclass(frozen=True)
class P4DKConfig:
    """As published; how many tokens are learnt follows from a prompt's length."""

    steps: int = 3000
    check_every: int = 50  # steps between two looks
    learning_rate: float = 0.1
    weight_decay: float = 0.1
    judged: int = 3  # images by which the prompt that was kept is judged
    restarts: int = 1
    seed: int = 0

    positive: ClassVar[tuple] = ("steps", "check_every", "learning_rate", "judged", "restarts")

    def check(self, method: str, steps: int) -> None:
        if self.steps % self.check_every:
            raise AegisError(f"attack {method}: steps={self.steps} is no multiple of check_every={self.check_every}")


@dataclasses.dataclass(frozen=True)
class P4DNConfig(P4DKConfig):
    """As published."""

    tokens: int = 16

    positive: ClassVar[tuple] = (*P4DKConfig.positive, "tokens")


def hard_prompt(pipeline, concept: str, given: Given, config: HardPromptConfig, progress=None) -> AttackResult:
    """MU-Attack's form, on every prompt of `given`, which must have the original."""
    return _searched(HARD_PROMPT, hard_prompt_plan, pipeline, given, config, progress)


def p4d_n(pipeline, concept: str, given: Given, config: P4DNConfig, progress=None) -> AttackResult:
    """P4D-N, on every prompt of `given`, which must have the original."""
    return _searched(N, n_plan, pipeline, given, config, progress)


def p4d_k(pipeline, concept: str, given: Given, config: P4DKConfig, progress=None) -> AttackResult:
    """P4D-K, likewise."""
    return _searched(K, k_plan, pipeline, given, config, progress)


def _searched(method: str, plan, pipeline, given: Given, config, progress) -> AttackResult:
    check(method, config, given.steps)
    needed(given, method)
    return search.Search(pipeline, given, plan(pipeline, given.prompts, config), progress).run()


def hard_prompt_plan(pipeline, prompts: list[str], config: HardPromptConfig) -> search.Plan:
    space = spaces.Nearest(config.learning_rate, config.weight_decay, decoupled=False)
    return phased(HARD_PROMPT, pipeline, prompts, config, space, to_prediction=True)


def n_plan(pipeline, prompts: list[str], config: P4DNConfig) -> search.Plan:
    return _official(N, config, [config.tokens] * len(prompts), "replace")


def k_plan(pipeline, prompts: list[str], config: P4DKConfig) -> search.Plan:
    tokens = [len(pipeline.tokenizer.tokens(prompt)) // EVERY + 1 for prompt in prompts]
    return _official(K, config, tokens, "per_k_words")


def _official(method: str, config: P4DKConfig, tokens: list[int], place: str) -> search.Plan:
    return search.Plan(
        method=method,
        space=spaces.Nearest(config.learning_rate, config.weight_decay, decoupled=True),
        tokens=tokens,
        place=place,
        timesteps=[search.DRAWN] * (config.steps // config.check_every),
        iterations=config.check_every,
        restarts=config.restarts,
        seed=config.seed,
        to_prediction=True,
        keep_best=True,
        judged=config.judged,
    )
