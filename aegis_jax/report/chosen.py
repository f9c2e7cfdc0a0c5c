"""Which attacks an evaluation runs, and with what settings; refused before anything starts where they cannot be.

What an attack alone can see in its settings it refuses itself when its turn comes; what is finished by then is kept.
"""

import dataclasses
import typing

from aegis_jax.attacks import METHODS, configure, find
from aegis_jax.attacks.family import FAMILY, family
from aegis_jax.attacks.prompt import insertion
from aegis_jax.errors import AegisError
from aegis_jax.evaluation import cases as world_cases
from aegis_jax.evaluation import world

SOFT_PROMPT = "soft-prompt"  # here not one of the family, but all of it


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """The adaptive family of soft prompts, at the scale of the study's screening; the strongest member counts."""

    members: tuple[str, ...] = tuple(FAMILY)
    restarts: int = 2
    steps: int = 100


def names(text: str) -> list[str]:
    """Those of a list with commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def chosen(text: str, settings: dict[str, dict[str, str]]) -> dict[str, object]:
    """{name: config}, scaled to the world, with the user's settings on top."""
    taken = list(METHODS) if text == "all" else [] if text == "none" else names(text)
    for name in taken:
        find(name)
    for name, given in settings.items():
        if name not in taken:
            raise AegisError(f"--attack.{name}.{next(iter(given))}: --attacks has {', '.join(taken) or 'none'}")
    return {name: _configured(name, settings.get(name, {})) for name in taken}


def _configured(name: str, given: dict[str, str]):
    kind = FamilyConfig if name == SOFT_PROMPT else find(name).config
    types = {k: v for k, v in typing.get_type_hints(kind).items() if k != "seed"}
    values = {}
    for key_, text in given.items():
        where = f"--attack.{name}.{key_}={text}"
        if key_ not in types:
            raise AegisError(f"{where}: {name} has no such setting; it has: {', '.join(types)}")
        try:
            values[key_] = tuple(names(text)) if key_ == "members" else types[key_](text)
        except ValueError:
            raise AegisError(f"{where}: wanted {types[key_].__name__}") from None
    usual = {} if name == SOFT_PROMPT else world_cases.SMALL.get(name, {})
    config = FamilyConfig(**values) if name == SOFT_PROMPT else configure(name, usual | values)
    for field in set(types) - {"weight_decay", "mutation", "crossover", "eta"}:
        value = getattr(config, field)
        if isinstance(value, int | float) and not value > 0:
            raise AegisError(f"--attack.{name}.{field}={value}: wanted more than 0")
    every = getattr(config, "check_every", 1)
    if getattr(config, "steps", 0) % every:
        raise AegisError(f"--attack.{name}: steps={config.steps} is no multiple of check_every={every}")
    if name == SOFT_PROMPT and not family(config.members):
        raise AegisError(f"--attack.{name}.members: wanted some of {', '.join(FAMILY)}")
    return config


def check_fit(pipeline, value: world.Concept, attacks: dict, cases: int, seeds, neutral) -> None:
    """Refuses learnt tokens that do not fit some prompt, which else were seen only when its turn comes."""
    for name, config in attacks.items():
        if find(name).of != "prompt" or not hasattr(config, "place"):
            continue
        for seed in seeds:
            for word in {None, neutral}:
                for text in world.concept_prompts(value, cases, world_cases.case_seed(seed), word=word):
                    insertion(pipeline.tokenizer, text, config.place, config.tokens)
