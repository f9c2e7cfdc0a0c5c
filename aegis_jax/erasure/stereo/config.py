"""STEREO's settings; the defaults are those of the published command (docs/method.md).

Rates are shares of the run's `learning_rate`, and all phases have as many of its `steps`, so that at the paper's scale
(1000 steps, 1e-5) they are the published ones: 200 steps each, of Adam at 5e-6 and, once, 2e-5.
"""

import dataclasses
import math

from aegis_jax.erasure import trainable
from aegis_jax.erasure.checks import checking

COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
# Texts around the token that is learnt, by what the concept is.
TEXTS = {
    "object": ("{}", "a photo of a {}", "a photo of the {}", "a picture of a {}", "a drawing of a {}", "one {}"),
    "style": ("{}", "a painting in the style of {}", "a picture in the style of {}", "a drawing in the style of {}"),
    "person": ("{}", "a photo of {}", "a picture of {}", "a portrait of {}"),
}


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Stage 1: in rounds, the concept (later the token that the round before has found) is erased, then learnt anew."""

    rounds: int = 2
    rate: float = 0.5  # of learning_rate
    eta: float = 0.0  # negative guidance; 0: towards the empty prompt


@dataclasses.dataclass(frozen=True)
class InversionConfig:
    """Textual inversion of the concept on the model that it was erased from."""

    steps: int = 15  # of AdamW on the token, for each step of the run
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    tokens: int = 1  # k, vectors of a token
    initial: str = "object"  # the word that it starts as; one token of the vocabulary
    texts: str = "object"  # object | style | person
    pictures: int = 500  # drawn by the original model, an equal share for each round
    prompt: str = ""  # that they are drawn by; "": the concept alone
    guidance: float = 7.5


@dataclasses.dataclass(frozen=True)
class OnceConfig:
    """Stage 2: from the original weights, all that was found and the concept at once."""

    rate: float = 2.0  # of learning_rate
    anchors: tuple[str, ...] = ()  # texts with the concept ("{}") among other things; (): a few simple ones (setup.py)
    anchor: float = 1.0  # weight of what an anchor adds to the empty prompt
    negative: float = 3.0  # weight of what the concept and its tokens add to it, on average


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """Where the latents z_t come from (erasure/latents.py)."""

    steps: int = 50  # DDIM steps of a whole trajectory
    refresh_every: int = 1  # 1: a new trajectory for every draw | R > 1: from a pool, redrawn after R steps


@dataclasses.dataclass(frozen=True)
class StereoConfig:
    """One erasure run."""

    method: str = "stereo"
    steps: int = 1000  # of all phases: two in each round of the search, and the last
    batch: int = 1  # latents per step; pictures per step of an inversion
    seed: int = 0
    learning_rate: float = 1e-5
    trainable: str = "full"  # full | xattn | noxattn | layers | kv
    compute_dtype: str = "auto"  # auto (bfloat16 on accelerators, float32 on CPU) | float32 | bfloat16
    low_memory: bool = False  # recompute in backward passes, Adam's moments in bfloat16
    search: SearchConfig = SearchConfig()
    inversion: InversionConfig = InversionConfig()
    once: OnceConfig = OnceConfig()
    latents: LatentsConfig = LatentsConfig()

    @property
    def phases(self) -> int:
        return 2 * self.search.rounds + 1


def check(config: StereoConfig) -> None:
    """Raises `AegisError` naming every setting that is out of its range."""
    with checking(config) as need:
        search, inversion, once, latents = config.search, config.inversion, config.once, config.latents
        need(search.rounds >= 1, "search.rounds", "at least 1")
        need(config.steps >= config.phases, "steps", f"at least {config.phases}, one for each phase")
        need(config.batch >= 1, "batch", "at least 1")
        need(0 <= config.seed < 2**32, "seed", "0 to 2**32 - 1")
        need(config.trainable in trainable.UNET, "trainable", " | ".join(trainable.UNET))
        need(config.compute_dtype in COMPUTE_DTYPES, "compute_dtype", " | ".join(COMPUTE_DTYPES))
        need(0 < config.learning_rate < math.inf, "learning_rate", "a positive number")
        need(0 < search.rate < math.inf, "search.rate", "a positive number")
        need(0 < once.rate < math.inf, "once.rate", "a positive number")
        need(0 <= once.anchor < math.inf, "once.anchor", "0 or more")
        need(0 <= once.negative < math.inf, "once.negative", "0 or more")
        need(0 < inversion.learning_rate < math.inf, "inversion.learning_rate", "a positive number")
        need(0 <= inversion.weight_decay < math.inf, "inversion.weight_decay", "0 or more")
        need(0 < inversion.guidance < math.inf, "inversion.guidance", "a positive number")
        need(math.isfinite(search.eta), "search.eta", "a finite number")
        need(inversion.steps >= 1, "inversion.steps", "at least 1")
        need(inversion.tokens >= 1, "inversion.tokens", "at least 1")
        need(inversion.texts in TEXTS, "inversion.texts", " | ".join(TEXTS))
        need(inversion.pictures >= search.rounds, "inversion.pictures", "at least one for each round")
        need(3 <= latents.steps <= 1000, "latents.steps", "3 to 1000")
        need(latents.refresh_every >= 1, "latents.refresh_every", "1 or more")
