"""What the world contains: three attributes, their values, and the words for each value."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Value:
    """One attribute value: a class of words that mean exactly the same thing.

    All words occur in training captions. `words[0]` is the value's name. `held_out` words are for
    measuring only: an erasure prompt never contains one, so a success on them is generalisation.
    """

    seen: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        return self.seen + self.held_out

    @property
    def name(self) -> str:
        return self.seen[0]


def _value(seen: str, held_out: str) -> Value:
    return Value(tuple(seen.split()), tuple(held_out.split()))


SHAPES = (
    _value("circle disc", "ball orb"),
    _value("square box", "block tile"),
    _value("triangle wedge", "pyramid trigon"),
    _value("star pentagram", "asterisk pentacle"),
    _value("heart valentine", "cardioid lovemark"),
    _value("cross plus", "crucifix cruciform"),
    _value("ring hoop", "annulus torus"),
    _value("moon crescent", "lune sickle"),
)
COLOURS = (
    _value("red crimson", "scarlet ruby"),
    _value("yellow golden", "lemon amber"),
    _value("green emerald", "grassy jade"),
    _value("cyan turquoise", "aqua teal"),
    _value("blue navy", "sapphire cobalt"),
    _value("purple violet", "lilac plum"),
)
TEXTURES = (
    _value("plain solid", "uniform flat"),
    _value("striped banded", "barred lined"),
    _value("dotted spotted", "speckled dappled"),
    _value("gradient shaded", "ombre faded"),
)
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES}
NONE = -1  # index of "none of these", in labels and in what the judge answers
COMBINATIONS = np.array(list(np.ndindex(*(len(v) for v in ATTRIBUTES.values()))))  # (192, 3)


def find(word: str) -> tuple[str, int]:
    """The attribute and index of the value that `word` belongs to; KeyError if it is no attribute
    word.
    """
    for attribute, values in ATTRIBUTES.items():
        for index, value in enumerate(values):
            if word in value.words:
                return attribute, index
    raise KeyError(word)


def named(text: str) -> list[tuple[str, str, int]]:
    """(word as written, attribute, index) of each word in `text` that names a value, in order."""
    known = {word: (a, i) for a, row in ATTRIBUTES.items() for i, value in enumerate(row) for word in value.words}
    return [(word, *known[word.lower()]) for word in text.split() if word.lower() in known]
