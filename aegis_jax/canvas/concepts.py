"""What the canvas contains: things in six artists' hands, the subgroups of things, and the words for each.

things.tsv has a thing a line: its emoji's code point, group and subgroup (emojibase's, the smallest of them put
together), seen and held-out words. The order is for good: a canvas of n things draws the first n.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.world.concepts import Value

THINGS = 96  # what a canvas draws unless its weights say otherwise
LEAST = 2
# Apart for the outside check: drawn like the others, but no erasure's settings are chosen on them.
OUTSIDE = ("plant-flower", "sport", "musical-instrument")


@dataclasses.dataclass(frozen=True)
class Thing:
    """A thing to draw: its words and where it belongs."""

    code: str
    group: str
    subgroup: str
    value: Value


def _value(seen: str, held_out: str) -> Value:
    return Value(tuple(seen.split()), tuple(held_out.split()))


# The first word is the set's own name; the second and those held out are names like an artist's, which say nothing.
STYLES = {
    "noto": _value("noto harlow", "mercer holt"),
    "blob": _value("blob linden", "abbott quinn"),
    "fluent": _value("fluent marlow", "carver nolan"),
    "relief": _value("relief winslow", "draper ellis"),
    "twemoji": _value("twemoji bramwell", "fletcher boyd"),
    "emojione": _value("emojione tolliver", "weaver sloan"),
}
SUBGROUPS = {
    "animal-mammal": _value("mammal beast", "quadruped critter"),
    "animal-bird": _value("fowl avian", "plumage feathered"),
    "animal-reptile": _value("reptile reptilian", "saurian scaly"),
    "animal-marine": _value("sealife marine", "aquatic oceanic"),
    "animal-bug": _value("insect bug", "pest vermin"),
    "plant-flower": _value("flower bloom", "floral wildflower"),
    "plant-other": _value("plant vegetation", "flora greenery"),
    "food-fruit": _value("fruit fruits", "produce fruity"),
    "food-vegetable": _value("vegetable veggie", "veg greens"),
    "food-prepared": _value("meal dish", "supper takeaway"),
    "food-sweet": _value("dessert sweet", "confection pudding"),
    "drink": _value("drink beverage", "refreshment booze"),
    "place-building": _value("building structure", "edifice premises"),
    "place-geographic": _value("landscape terrain", "scenery landform"),
    "transport-ground": _value("vehicle transport", "wheels roadster"),
    "transport-water": _value("boat vessel", "watercraft maritime"),
    "transport-air": _value("flight aviation", "airborne flying"),
    "sky-weather": _value("weather sky", "climate celestial"),
    "event": _value("party celebration", "festivity holiday"),
    "sport": _value("sport athletics", "sports sporting"),
    "game": _value("game gaming", "gambling playtime"),
    "musical-instrument": _value("instrument music", "orchestra musical"),
    "clothing": _value("clothing apparel", "garment outfit"),
    "light-video": _value("appliance lighting", "gadget electronics"),
    "office": _value("stationery office", "desk paperwork"),
    "tool": _value("tool hardware", "toolbox implement"),
    "science": _value("science laboratory", "scientific apparatus"),
    "household": _value("household domestic", "housewares homeware"),
}
# Said of several subgroups, by what their names begin with: never what is erased, but words that a caption may have.
BROADER = {"animal": ("animal", "creature"), "food": ("food", "snack"), "transport": ("conveyance", "machine")}


@functools.cache
def catalogue() -> tuple[Thing, ...]:
    """Every thing of things.tsv, in its order."""
    lines = (pathlib.Path(__file__).parent / "things.tsv").read_text("utf-8").splitlines()[1:]
    rows = (line.split("\t") for line in lines)
    return tuple(Thing(code, group, subgroup, _value(seen, held_out)) for code, group, subgroup, seen, held_out in rows)


@dataclasses.dataclass(frozen=True)
class Concepts:
    """The values of a canvas of its first `count` things."""

    count: int = THINGS

    def __post_init__(self):
        if not LEAST <= self.count <= len(catalogue()):
            raise AegisError(f"a canvas of {self.count} things: wanted {LEAST} to {len(catalogue())}")

    @property
    def things(self) -> tuple[Thing, ...]:
        return catalogue()[: self.count]

    @functools.cached_property
    def subgroups(self) -> tuple[str, ...]:
        """Those of its things, in the order of `SUBGROUPS`."""
        used = {thing.subgroup for thing in self.things}
        return tuple(name for name in SUBGROUPS if name in used)

    @functools.cached_property
    def attributes(self) -> dict[str, tuple[Value, ...]]:
        """{"thing" | "style" | "subgroup": its values}; a picture has one of each."""
        return {
            "thing": tuple(thing.value for thing in self.things),
            "style": tuple(STYLES.values()),
            "subgroup": tuple(SUBGROUPS[name] for name in self.subgroups),
        }

    @functools.cached_property
    def subgroup_of(self) -> np.ndarray:
        """(count,) index of each thing's subgroup."""
        return np.array([self.subgroups.index(thing.subgroup) for thing in self.things])

    @functools.cached_property
    def combinations(self) -> np.ndarray:
        """(6 * count, 3): every thing in every hand, with its subgroup."""
        thing, style = np.indices((self.count, len(STYLES))).reshape(2, -1)
        return np.stack([thing, style, self.subgroup_of[thing]], axis=1)

    @functools.cached_property
    def broader_of(self) -> np.ndarray:
        """(subgroups,) index into `BROADER` of what a subgroup belongs to, or -1."""
        names = list(BROADER)
        heads = [name.partition("-")[0] for name in self.subgroups]
        return np.array([names.index(head) if head in names else -1 for head in heads])

    def named(self, text: str) -> list[tuple[str, str, int]]:
        """(word as written, attribute, index) of each word in `text` that names a value, in order."""
        known = {w: (a, i) for a, row in self.attributes.items() for i, value in enumerate(row) for w in value.words}
        return [(word, *known[word.lower()]) for word in text.split() if word.lower() in known]

    def rings(self, attribute: str, index: int) -> dict[str, tuple[int, ...]]:
        """The attribute's other values by their distance from one, nearest first; only rings that have any."""
        others = [i for i in range(len(self.attributes[attribute])) if i != index]
        if attribute != "thing":
            return {f"other {attribute}s": tuple(others)}
        mine = self.things[index]
        rings = {"same subgroup": [], "same group": [], "other things": []}
        for i in others:
            thing = self.things[i]
            near = thing.subgroup == mine.subgroup
            name = "same subgroup" if near else "same group" if thing.group == mine.group else "other things"
            rings[name].append(i)
        return {name: tuple(ring) for name, ring in rings.items() if ring}
