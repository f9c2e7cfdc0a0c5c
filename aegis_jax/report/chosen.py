"""Which attacks an evaluation runs, and with what settings; refused before anything starts where they cannot be.

What only an attack with model and pictures can see it refuses when its turn comes; what is finished by then is kept.
"""

import dataclasses
import typing
import warnings
from collections.abc import Iterable

from aegis_jax.attacks import METHODS, configure, find
from aegis_jax.attacks.family import FAMILY, family
from aegis_jax.attacks.given import check
from aegis_jax.errors import AegisError

SOFT_PROMPT = "soft-prompt"  # here not one of the family, but all of it


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """The adaptive family of soft prompts, at the scale of the study's screening; the strongest member counts."""

    members: tuple[str, ...] = tuple(FAMILY)
    restarts: int = 2
    steps: int = 100

    positive: typing.ClassVar[tuple] = ("restarts", "steps")

    def check(self, method: str, steps: int) -> None:
        if not family(self.members):
            raise AegisError(f"attack {method}: members={self.members!r}, wanted some of {', '.join(FAMILY)}")


def listed(name: str, given) -> str:
    """A list as the command line has it, of such or of Python's. Raises `AegisError` for anything else."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Iterable):
        raise AegisError(f"{name}={given!r:.80}: wanted a text with commas, or a list")
    return ",".join(map(str, given))


def names(text: str) -> list[str]:
    """Those of a list with commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def chosen(text: str, settings: dict[str, dict[str, str]], usual: dict[str, dict]) -> dict[str, object]:
    """{name: config}, with `usual` in place of attacks' own settings and the user's settings on top."""
    taken = list(METHODS) if text == "all" else [] if text == "none" else names(text)
    for name in taken:
        find(name)
    for name, given in settings.items():
        if name not in taken:
            raise AegisError(f"--attack.{name}.{next(iter(given))}: --attacks has {', '.join(taken) or 'none'}")
    return {name: _configured(name, settings.get(name, {}), usual.get(name, {})) for name in taken}


def _configured(name: str, given: dict[str, str], usual: dict):
    kind = FamilyConfig if name == SOFT_PROMPT else find(name).config
    hints = typing.get_type_hints(kind)
    types = {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name != "seed"}
    values = {}
    for key_, text in given.items():
        where = f"--attack.{name}.{key_}={text}"
        if key_ not in types:
            raise AegisError(f"{where}: {name} has no such setting; it has: {', '.join(types)}")
        try:
            values[key_] = tuple(names(text)) if key_ == "members" else types[key_](text)
        except ValueError:
            raise AegisError(f"{where}: wanted {types[key_].__name__}") from None
    return FamilyConfig(**values) if name == SOFT_PROMPT else configure(name, usual | values)


def possible(subject, attacks: dict, *, everything: bool) -> tuple[dict, dict[str, str]]:
    """(those that the subject has all for, {another: why it is left out}). Raises `AegisError` for another that was
    named; of `everything` a warning says so too."""
    lacking = {name: reason for name in attacks if (reason := subject.lacks(name))}
    if lacking and not everything:
        name, reason = next(iter(lacking.items()))
        raise AegisError(f"--attacks {name} needs {reason}")
    for name, reason in lacking.items():
        warnings.warn(f"--attacks all leaves out {name}, which needs {reason}", stacklevel=2)
    left_out = {name: f"needs {reason}" for name, reason in lacking.items()}
    return {name: config for name, config in attacks.items() if name not in lacking}, left_out


def fitting(
    pipeline, subject, attacks: dict, cases: int, seeds, neutral, *, unnamed=frozenset()
) -> tuple[dict, dict[str, str]]:
    """(those whose settings can be, and that fit the model and every prompt, {another: why it is left out}). Raises
    `AegisError` for another, before its turn comes; of `unnamed` ones, for which nobody asked by name, a warning says
    so too."""
    said = (subject.texts(cases, seed, word) for seed in seeds for word in (None, neutral))
    prompts = list(dict.fromkeys(text for texts in said for text in texts))
    taken, left_out = {}, {}
    for name, config in attacks.items():
        try:
            _check_fit(pipeline, subject, prompts, name, config)
        except AegisError as refused:
            if name not in unnamed:
                raise
            left_out[name] = str(refused)
            warnings.warn(f"--attacks all leaves out {name}: {refused}", stacklevel=2)
        else:
            taken[name] = config
    return taken, left_out


def _check_fit(pipeline, subject, prompts: list[str], name: str, config) -> None:
    check(name, config, subject.steps)
    refuse = find(name).check_fit
    for one in family(config.members).values() if name == SOFT_PROMPT else [config]:
        if refuse is not None:
            refuse(pipeline, subject.text, prompts, one)
