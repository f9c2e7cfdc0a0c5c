"""The world as evaluation asks for it (interface.py)."""

from aegis_jax.world import captions, clip, concepts, judge, renderer
from aegis_jax.world.interface import EmbeddedWorld

# (first, stride) over a picture's columns.
_VARIETY = {"shape": (4, 5), "colour": (0, 2), "texture": (0, 1)}


def prompt(rng, axis: int, word: str) -> str:
    """A prompt that names `word`; the other attributes are said with seen words, or left unsaid now and then."""
    words = [
        rng.choice(values[rng.integers(len(values))].seen) if rng.random() < 0.7 else ""
        for values in concepts.ATTRIBUTES.values()
    ]
    words[axis] = word
    words[0] = words[0] or rng.choice(captions.NOUNS)
    return captions.fill(captions.TEMPLATES[rng.integers(len(captions.TEMPLATES))], *words)


def said(rng, row) -> str:
    """A row of labels (3,) in seen words."""
    words = [rng.choice(values[i].seen) for values, i in zip(concepts.ATTRIBUTES.values(), row)]
    return captions.fill("{a thing}", *words)


def left_open(rng, axis: int) -> str:
    """The two other attributes in seen words, any values of theirs."""
    words = [rng.choice(values[rng.integers(len(values))].seen) for values in concepts.ATTRIBUTES.values()]
    words[axis] = rng.choice(captions.NOUNS) if axis == 0 else ""
    return captions.fill("{a thing}", *words)


def worded(rng, axis: int, word: str, more: int, late: bool = False) -> str:
    """`word` with the words of `more` other attributes; late: behind the noun."""
    words, others = ["", "", ""], [other for other in range(3) if other != axis]
    for other in rng.permutation(others)[:more]:
        values = list(concepts.ATTRIBUTES.values())[other]
        words[other] = rng.choice(values[rng.integers(len(values))].seen)
    words[axis] = word
    words[0] = words[0] or rng.choice(captions.NOUNS)
    template = "{a thing}" if more > 1 else "an image of {a thing}"
    return captions.fill("a picture of {a late}" if late else template, *words)


def shown(phrase: str, count: int, gone=frozenset()) -> tuple[str, ...]:
    """Captions of things as in `phrase`, each with values of its own for what is left open, none of those in `gone`."""
    named = {attribute: word for word, attribute, _ in concepts.named(phrase)}

    def choose(attribute, k):
        if attribute in named:
            return named[attribute]
        every = concepts.ATTRIBUTES[attribute]
        values = [value for i, value in enumerate(every) if (attribute, i) not in gone] or every
        start, stride = _VARIETY[attribute]
        return values[(start + stride * k) % len(values)].name

    return tuple(captions.fill("{a thing}", *(choose(a, k) for a in concepts.ATTRIBUTES)) for k in range(count))


def beside(attribute: str, index: int, gone=frozenset()) -> tuple[int, ...]:
    """The next two values that are not in `gone`."""
    count = len(concepts.ATTRIBUTES[attribute])
    after = ((index + step) % count for step in range(1, count))
    return tuple(i for i in after if (attribute, i) not in gone)[:2]


def rings(attribute: str, index: int) -> dict[str, tuple[int, ...]]:
    """All other values are as near."""
    others = (i for i in range(len(concepts.ATTRIBUTES[attribute])) if i != index)
    return {f"other {attribute}s": tuple(others)}


WORLD = EmbeddedWorld(
    name="world",
    attributes=concepts.ATTRIBUTES,
    combinations=concepts.COMBINATIONS,
    nouns=captions.NOUNS,
    domains=tuple(concepts.ATTRIBUTES),
    named=concepts.named,
    prompt=prompt,
    said=said,
    left_open=left_open,
    worded=worded,
    shown=shown,
    beside=beside,
    rings=rings,
    judge=lambda name: judge.load(name),  # looked up when asked for: tests put others in its place
    clip=lambda: clip.load(),
    render=renderer.render,
)
