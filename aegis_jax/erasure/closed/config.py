"""The settings of the closed forms, with the names that the field gives them; the defaults are the published ones.

Plain frozen data, as of every method. A text in a list may be empty: the empty prompt.
"""

import dataclasses
import math

from aegis_jax.erasure.checks import checking

TOKENS = ("last", "from_last", "all")
PROJECTIONS = ("kv", "k", "v")


@dataclasses.dataclass(frozen=True)
class UCEConfig:
    """Unified Concept Editing (uce.py)."""

    method: str = "uce"
    steps: int = 1  # a closed form has no other number
    seed: int = 0  # of the pictures before and after; nothing is drawn for the erasure
    guide: tuple[str, ...] = ("",)  # what concepts are erased to: one text for all, or one for each
    preserve: tuple[str, ...] = ()  # texts whose keys and values are held where they are
    # Which tokens of a text are meant: its last | from that on, with EOS and padding | all of the prompt's
    tokens: str = "last"  # of the concepts and their guides
    preserve_tokens: str = "last"  # of the preserved texts
    erase_scale: float = 1.0  # weight of the erased rows
    preserve_scale: float = 1.0  # weight of the preserved rows
    lamb: float = 0.5  # weight of the change itself, ||W* - W||^2
    projections: str = "kv"  # kv | k | v: keys, values of cross-attention


@dataclasses.dataclass(frozen=True)
class RECEConfig(UCEConfig):
    """Reliable and Efficient Concept Erasure (rece.py): the edit of UCE, repeated against a derived adversary."""

    method: str = "rece"
    preserve: tuple[str, ...] = ("",)
    tokens: str = "from_last"  # of the first edit; those against the adversary are of all tokens
    preserve_tokens: str = "all"
    preserve_scale: float = 0.1
    lamb: float = 0.1
    epochs: int = 3  # derived adversaries, one edit against each
    regular_scale: float = 0.1  # weight of the adversary's own norm


@dataclasses.dataclass(frozen=True)
class SPEEDConfig:
    """SPEED: an edit in the null space of what is preserved (speed.py)."""

    method: str = "speed"
    steps: int = 1
    seed: int = 0  # of the pictures, and of the augmentation's noise
    guide: tuple[str, ...] = ("",)
    preserve: tuple[str, ...] = ("",)  # their last tokens; of an empty text all but BOS
    tokens: str = "last"  # of the concepts and their guides, as for UCE; all: without BOS
    threshold: float = 0.1  # variance of the preserved rows up to which a direction counts as free
    aug_num: int = 10  # noisy copies of each preserved row; 0: neither these nor the filter
    retain_scale: float = 1.0  # weight of the change itself
    lamb: float = 0.0  # slack of the constraint that BOS and the empty prompt stay
    projections: str = "v"


@dataclasses.dataclass(frozen=True)
class OCEConfig:
    """Orthogonal Concept Erasure (oce.py)."""

    method: str = "oce"
    steps: int = 1
    seed: int = 0  # of the pictures, and of which words stand for ordinary text
    guide: tuple[str, ...] = ("",)
    preserve: tuple[str, ...] = ()  # as for UCE
    tokens: str = "last"
    preserve_tokens: str = "last"
    erase_scale: float = 1.0
    preserve_scale: float = 0.3
    generic_scale: float = 0.5  # weight of ordinary text
    generic_words: int = 512  # words of the tokenizer that stand for it
    lamb: float = 1.5  # weight of all outputs alike
    projections: str = "v"


def check(config) -> None:
    """Raises `AegisError` naming every setting that is out of its range."""
    with checking(config, sorted) as need:
        need(config.steps == 1, "steps", "1: a closed form is solved once")
        need(0 <= config.seed < 2**32, "seed", "0 to 2**32 - 1")
        need(len(config.guide) >= 1, "guide", "one text, which may be empty, or one for each concept")
        choices = {"tokens": TOKENS, "preserve_tokens": TOKENS, "projections": PROJECTIONS}
        for key in choices.keys() & vars(config).keys():
            need(getattr(config, key) in choices[key], key, " | ".join(choices[key]))
        for key in {"erase_scale", "preserve_scale", "generic_scale", "lamb"} & vars(config).keys():
            need(0 <= getattr(config, key) < math.inf, key, "0 or more")
        for key in {"regular_scale", "retain_scale", "threshold"} & vars(config).keys():
            need(0 < getattr(config, key) < math.inf, key, "more than 0")
        for key in {"epochs", "aug_num", "generic_words"} & vars(config).keys():
            need(getattr(config, key) >= 0, key, "0 or more")
