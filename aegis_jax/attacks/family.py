"""The members of the adaptive family of soft-prompt attacks, by name.

A defence is trained against some form of prompt; an attack of just that form measures little. So every defence meets
all of these, and the strongest three against it go into its final figures (see evaluation/attacked.py).
"""

from collections.abc import Iterable

from aegis_jax.attacks.soft_prompt import SoftPromptConfig
from aegis_jax.errors import AegisError


def _member(place: str, tokens: int, goal: str, learning_rate: float) -> SoftPromptConfig:
    return SoftPromptConfig(tokens=tokens, place=place, goal=goal, learning_rate=learning_rate, steps=150)


FAMILY = {
    "before-1-prediction": _member("before", 1, "prediction", 3e-2),
    "before-4-denoising": _member("before", 4, "denoising", 1e-2),
    "before-4-prediction": _member("before", 4, "prediction", 1e-2),
    "before-8-denoising": _member("before", 8, "denoising", 3e-2),
    "before-8-prediction": _member("before", 8, "prediction", 3e-2),
    "behind-4-prediction": _member("behind", 4, "prediction", 3e-2),
    "alone-1-denoising": _member("alone", 1, "denoising", 3e-2),
    "alone-8-denoising": _member("alone", 8, "denoising", 3e-2),
    "alone-8-prediction": _member("alone", 8, "prediction", 3e-2),
    "neutral-4-denoising": _member("neutral", 4, "denoising", 3e-2),
    "neutral-4-prediction": _member("neutral", 4, "prediction", 3e-2),
}
# In every final, whatever the screening says: with the original's prediction as goal an attacker's own choice among
# his restarts found what other members did not.
ALWAYS = "before-4-prediction"


def family(names: Iterable[str] = FAMILY) -> dict[str, SoftPromptConfig]:
    """Members by name, all by default. Raises `AegisError` for an unknown one."""
    names = list(names)
    unknown = [name for name in names if name not in FAMILY]
    if unknown:
        raise AegisError(f"attack {unknown[0]!r} is not in the family: {', '.join(FAMILY)}")
    return {name: FAMILY[name] for name in names}
