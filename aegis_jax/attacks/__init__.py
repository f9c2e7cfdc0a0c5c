"""Attacks that try to bring an erased concept back. `attack` is the one entry; each method has a file."""

from aegis_jax.attacks.soft_prompt import AttackResult, SoftPromptConfig, soft_prompt
from aegis_jax.errors import AegisError

METHODS = {"soft_prompt": (soft_prompt, SoftPromptConfig)}


def attack(
    pipeline, concept: str, *, method: str = "soft_prompt", images, original=None, progress=None, **settings
) -> AttackResult:
    """Attacks an erased pipeline.

    Args:
      pipeline: the pipeline under attack.
      concept: the erased concept's text.
      method: a key of `METHODS`.
      images: uint8 (m, H, W, 3), what the concept looks like; from the model before erasure, or real ones.
      original: the pipeline before erasure, where the attacker has it; some goals need it.
      progress: called with (done, in all, mean loss); steps of all restarts are counted.
      settings: fields of the method's config class.

    Raises `AegisError` for an unknown method or setting.
    """
    if method not in METHODS:
        raise AegisError(f"attack method {method!r} is unknown; choose one of: {', '.join(METHODS)}")
    run, config_class = METHODS[method]
    unknown = sorted(set(settings) - set(config_class.__dataclass_fields__))
    if unknown:
        known = ", ".join(config_class.__dataclass_fields__)
        raise AegisError(f"attack {method} has no setting {unknown[0]!r}; it has: {known}")
    return run(pipeline, concept, images, config_class(**settings), progress, original=original)
