"""What a value in a config.json may be: a malformed file is refused by key before anything is built from it."""

import sys
from collections.abc import Callable
from typing import NamedTuple


class Kind(NamedTuple):
    accepts: Callable[[object], bool]
    wanted: str  # completes "wanted ..."


def _is_whole(value, least: int) -> bool:
    return type(value) is int and least <= value < 2**31


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0


def each(kind: Kind) -> Kind:
    return Kind(lambda v: _is_list(v) and all(map(kind.accepts, v)), f"a list, each entry {kind.wanted}")


def one_or_each(kind: Kind) -> Kind:
    return Kind(lambda v: kind.accepts(v) or each(kind).accepts(v), f"{kind.wanted}, or a list of such")


def optional(kind: Kind) -> Kind:
    return Kind(lambda v: v is None or kind.accepts(v), f"{kind.wanted}, or null")


# Far above any model's: of larger ones there is no array, or no program that ends.
SIZE = Kind(lambda v: _is_whole(v, 1) and v <= 2**24, "a whole number from 1 to 2**24")
KERNEL = Kind(lambda v: _is_whole(v, 1) and v < 100, "a whole number from 1 to 99")
LAYERS_OR_NONE = Kind(lambda v: _is_whole(v, 0) and v <= 1000, "a whole number from 0 to 1000")
LAYERS = Kind(lambda v: _is_whole(v, 1) and v <= 1000, "a whole number from 1 to 1000")
COUNT = Kind(lambda v: _is_whole(v, 0), "a whole number of at least 0")
NUMBER = Kind(_is_number, "a number")
POSITIVE = Kind(lambda v: _is_number(v) and v > 0, "a number above 0")
SHARE = Kind(lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
FLAG = Kind(lambda v: v is None or type(v) is bool, "true or false")
NAME = Kind(lambda v: isinstance(v, str), "a text")
SIDES = Kind(lambda v: SIZE.accepts(v) or (each(SIZE).accepts(v) and len(v) == 2), "one size, or height and width")


def problems(config: dict, kinds: dict[str, Kind]) -> list[str]:
    """What is wrong with the values of those keys of `config` that `kinds` names."""
    return [
        f"{key}={config[key]!r:.60} (wanted: {kind.wanted})"
        for key, kind in kinds.items()
        if key in config and not kind.accepts(config[key])
    ]
