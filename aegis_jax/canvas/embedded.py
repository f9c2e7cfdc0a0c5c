"""The canvas as evaluation asks for it (aegis_jax/world/interface.py)."""

import functools
import json
import pathlib

from aegis_jax.canvas import WEIGHTS, captions, clip
from aegis_jax.canvas.concepts import THINGS, Concepts
from aegis_jax.world import judge
from aegis_jax.world.interface import EmbeddedWorld

_THING, _STYLE, _SUBGROUP = range(3)
_LATE = "a picture of {a thing} by {style}"
_SAID = 0.7  # how often a prompt says what else there is


def concepts_of(folder: pathlib.Path = WEIGHTS) -> Concepts:
    """What the canvas in `folder` draws; by default what a new one would."""
    record = folder / "concepts.json"
    return Concepts(json.loads(record.read_text())["things"] if record.is_file() else THINGS)


class Prompts:
    """Prompts of a canvas of some concepts."""

    def __init__(self, concepts: Concepts):
        self.concepts, self.values = concepts, tuple(concepts.attributes.values())

    def _any(self, rng, axis: int) -> str:
        values = self.values[axis]
        return rng.choice(values[rng.integers(len(values))].seen)

    def prompt(self, rng, axis: int, word: str) -> str:
        """A prompt that names `word`; thing or style are said with a seen word too, or left unsaid now and then."""
        if axis == _STYLE:
            noun = self._any(rng, _THING) if rng.random() < _SAID else rng.choice(captions.NOUNS)
            return captions.fill(captions.STYLED[rng.integers(len(captions.STYLED))], noun, word)
        style = self._any(rng, _STYLE) if rng.random() < _SAID else ""
        templates = captions.STYLED if style else captions.PLAIN
        return captions.fill(templates[rng.integers(len(templates))], word, style)

    def said(self, rng, row) -> str:
        """Thing and style of a row of labels (3,) in seen words; the subgroup follows from the thing."""
        return captions.phrase(*(rng.choice(self.values[axis][row[axis]].seen) for axis in (_THING, _STYLE)))

    def left_open(self, rng, axis: int) -> str:
        """Of a thing or subgroup: any style of something; of a style: any thing."""
        if axis == _STYLE:
            return captions.phrase(self._any(rng, _THING))
        return captions.phrase(rng.choice(captions.NOUNS), self._any(rng, _STYLE))

    def worded(self, rng, axis: int, word: str, more: int, late: bool = False) -> str:
        """`word` with a style or, of a style, with a thing, if more is to be said; late: behind it."""
        other = self._any(rng, _THING if axis == _STYLE else _STYLE) if more else ""
        thing, style = (other or rng.choice(captions.NOUNS), word) if axis == _STYLE else (word, other)
        template = "{style} {thing}" if more == 1 else captions.STYLED[0]
        return captions.fill(_LATE if late else template if style else "a picture of {a thing}", thing, style)

    def shown(self, phrase: str, count: int, gone=frozenset()) -> tuple[str, ...]:
        """What `phrase` names in one style after another, or a style's drawings of one thing after another; none of
        those in `gone`."""
        named = {attribute: word for word, attribute, _ in self.concepts.named(phrase)}
        style, noun = named.get("style"), named.get("thing") or named.get("subgroup")
        things, styles = (
            [value.name for i, value in enumerate(self.values[axis]) if (attribute, i) not in gone]
            for axis, attribute in ((_THING, "thing"), (_STYLE, "style"))
        )
        return tuple(
            captions.phrase(noun or things[7 * k % len(things)], style or styles[k % len(styles)]) for k in range(count)
        )

    def beside(self, attribute: str, index: int, gone=frozenset()) -> tuple[int, ...]:
        """One of the nearest and one of the farthest ring, or two where there is one alone; none of those in `gone`."""
        rings = self.concepts.rings(attribute, index).values()
        left = [kept for ring in rings if (kept := [i for i in ring if (attribute, i) not in gone])]
        return tuple(left[0][:2] if len(left) == 1 else [ring[0] for ring in left[:1] + left[1:][-1:]])


@functools.cache
def canvas(folder: pathlib.Path = WEIGHTS) -> EmbeddedWorld:
    """The canvas in `folder`; without its weights, all but judges and CLIP is there."""
    concepts = concepts_of(folder)
    prompts = Prompts(concepts)
    return EmbeddedWorld(
        name="canvas",
        attributes=concepts.attributes,
        combinations=concepts.combinations,
        nouns=captions.NOUNS,
        domains=("thing", "style"),
        named=concepts.named,
        prompt=prompts.prompt,
        said=prompts.said,
        left_open=prompts.left_open,
        worded=prompts.worded,
        shown=prompts.shown,
        beside=prompts.beside,
        rings=concepts.rings,
        judge=functools.cache(lambda name: judge.read(folder / name, concepts.attributes)),
        clip=lambda: clip.load(folder, concepts),
    )
