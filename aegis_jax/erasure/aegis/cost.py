"""How many UNet evaluations an erasure takes, from its settings alone.

The unit is one forward pass at batch 1. Backward passes are counted by their arithmetic relative to a forward, as
measured by operator counts on the UNet of SD 1.4.
"""

import dataclasses

from aegis_jax.erasure.aegis import shown
from aegis_jax.erasure.aegis.config import EraseConfig, latents_of_concepts
from aegis_jax.erasure.aegis.setup import uses_pool
from aegis_jax.erasure.latents import TRAJECTORIES

BACKWARD_TO_TEXT = 1.08  # of a forward: gradient with respect to the text embedding only
BACKWARD_TO_ALL = 2.0  # gradient with respect to every parameter
_GUIDED = 2  # a guided step predicts with and without the prompt


@dataclasses.dataclass(frozen=True)
class Cost:
    """UNet evaluations per training step, on average over a run.

    Attributes:
      latents: where z_t comes from: partial trajectories, or filling and redrawing the pools, and saying which of
        those in context show the concept.
      soft: the sign steps of v and p. erasure: target and gradient.
      words: random words, and their preservation.
    """

    latents: float
    soft: float
    erasure: float
    words: float

    @property
    def total(self) -> float:
        return self.latents + self.soft + self.erasure + self.words


def unet_evaluations(config: EraseConfig, concepts: int = 1) -> Cost:
    """What a run of `config.steps` steps over `concepts` concepts takes per step, its first pool included."""
    batch = config.batch
    sign_step = 1 + BACKWARD_TO_TEXT
    moves = config.moves_p + config.moves_v
    draws = (moves > 0 or config.latents.shared) + (not config.latents.shared)
    return Cost(
        latents=draws * _latents(config, concepts) + _in_context(config, concepts),
        # theta0 for c_e; a sign step each; for v's also theta for c_e.
        soft=batch * ((moves > 0) + moves * sign_step + config.moves_v),
        # theta0 for c' and c_0, theta for c* with its gradient.
        erasure=batch * (2 + 1 + BACKWARD_TO_ALL),
        # theta0, also with the concept among them, and, to preserve them, theta with its gradient.
        words=batch * (config.draws_words + config.moves_kappa)
        + batch * (1 + BACKWARD_TO_ALL) * (config.words.preserve > 0),
    )


def _latents(config: EraseConfig, concepts: int) -> float:
    steps = config.latents.steps
    if not uses_pool(config, concepts):
        # Grid position i is uniform on 0 .. steps - 1 and takes i guided steps; with the offset i + 1, the last as many
        # as the one before.
        mean = (steps + 1) / 2 - 1 / steps if config.latents.offset else (steps - 1) / 2
        return config.batch * _GUIDED * mean
    drawn = _trajectories(config, concepts, config.latents.refresh_every)
    return _GUIDED * (steps - config.latents.offset) * drawn / config.steps


def _in_context(config: EraseConfig, concepts: int) -> float:
    """Trajectories of the concept among words, and theta0's verdict on each, for the words and with the concept."""
    if config.words.context != "shown":
        return 0.0
    drawn = _trajectories(config, concepts, config.context_refresh)
    return (_GUIDED * config.latents.steps + 2 * shown.LEVELS) * drawn / config.steps


def _trajectories(config: EraseConfig, concepts: int, refresh_every: int) -> int:
    """How many trajectories a pool is given in a run."""
    drawn = 0
    for latents in latents_of_concepts(config, concepts):
        visits = -(-latents * min(concepts, config.batch) // config.batch)  # a concept's share of a batch is a visit
        drawn += 1 + max(visits - 1, 0) // (refresh_every * min(concepts, config.batch))
    return drawn * max(1, min(TRAJECTORIES, config.steps * config.batch // concepts))
