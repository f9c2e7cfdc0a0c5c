"""How many UNet evaluations an erasure takes, from its settings alone (method.md section 6).

The unit is one forward pass at batch 1. Backward passes are counted by their arithmetic relative to a forward, as
measured by operator counts on the UNet of SD 1.4.
"""

import dataclasses

from aegis_jax.erasure.config import EraseConfig

BACKWARD_TO_TEXT = 1.08  # of a forward: gradient with respect to the text embedding only
BACKWARD_TO_ALL = 2.0  # gradient with respect to every parameter
_GUIDED = 2  # a guided step predicts with and without the prompt


@dataclasses.dataclass(frozen=True)
class Cost:
    """UNet evaluations per training step, on average over a run.

    Attributes:
      latents: where z_t comes from: partial trajectories, or filling and redrawing the buffer.
      aet, prompt, erasure: the parts of method.md 3.2, 3.3 and 3.4.
      words: random words, and their preservation (words.py).
    """

    latents: float
    aet: float
    prompt: float
    erasure: float
    words: float

    @property
    def total(self) -> float:
        return self.latents + self.aet + self.prompt + self.erasure + self.words


def unet_evaluations(config: EraseConfig, concepts: int = 1) -> Cost:
    """What a run of `config.steps` steps over `concepts` concepts takes per step, its first buffer included."""
    batch = config.batch
    return Cost(
        latents=_latents(config, concepts),
        # theta for c_e, theta0 for c' with its gradient, theta0 for the new c'.
        aet=batch * (3 + BACKWARD_TO_TEXT) * config.aet.enabled,
        prompt=batch * (1 + BACKWARD_TO_TEXT) * config.prompt.enabled,
        # theta0 for c_e and c_0, theta for c* with its gradient.
        erasure=batch * (3 + BACKWARD_TO_ALL),
        # theta0, also with the concept among them, and, to preserve them, theta with its gradient.
        words=batch * (config.draws_words + config.moves_kappa)
        + batch * (1 + BACKWARD_TO_ALL) * (config.preserve.weight > 0),
    )


def _latents(config: EraseConfig, concepts: int) -> float:
    latents = config.latents
    if latents.refresh_every == 1:
        return config.batch * _GUIDED * (latents.steps - 1) / 2  # s is uniform on 0 .. steps - 1
    redrawn = 0
    if latents.refresh_every:
        for concept in range(concepts):
            visits = len(range(concept, config.steps, concepts))
            redrawn += max(visits - 1, 0) // latents.refresh_every  # at visits R, 2R, ...; visits count from 0
    return _GUIDED * latents.steps * latents.trajectories * (concepts + redrawn) / config.steps
