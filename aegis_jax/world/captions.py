"""Captions: templates over the words of `concepts`, with attributes left unsaid now and then."""

import numpy as np

from aegis_jax.world.concepts import ATTRIBUTES, COMBINATIONS

# {a thing} is article, adjectives, noun; {thing} the same without article; {a late} says the
# adjectives after the noun.
TEMPLATES = (
    "{thing}",
    "{a thing}",
    "{a thing}",
    "a picture of {a thing}",
    "an image of {a thing}",
    "a photo of {a thing}",
    "a drawing of {a thing}",
    "the {thing}",
    "{a thing} on a background",
    "one {thing} in the picture",
    "{a late}",
    "a picture of {a late}",
)
NOUNS = ("thing", "object", "figure")  # stands in where the shape is left unsaid
UNSAID = 0.15  # probability that an attribute is left unsaid, each
LONGEST = 11  # words
EMPTY = 0.1  # share of empty captions, for classifier-free guidance
FILLERS = sorted(
    set("a an the of on in one that is and looks picture image photo drawing background".split()) | set(NOUNS)
)


def words() -> list[str]:
    """Every word that can occur in a caption, in a fixed order."""
    return FILLERS + [w for values in ATTRIBUTES.values() for v in values for w in v.words]


def _with_article(phrase: str) -> str:
    # "uniform" sounds like "you": the only attribute word whose first letter misleads.
    vowel = phrase[0] in "aeiou" and not phrase.startswith("uniform")
    return f"{'an' if vowel else 'a'} {phrase}"


def fill(template: str, shape: str, colour: str, texture: str, texture_first: bool = True) -> str:
    """The caption for given words; "" leaves an attribute unsaid (`shape` is then one of NOUNS)."""
    adjectives = [texture, colour] if texture_first else [colour, texture]
    if "{a late}" in template:  # "a star that is red and striped"
        said = " and ".join(w for w in adjectives if w)
        return template.replace("{a late}", _with_article(shape) + (f" that is {said}" if said else ""))
    thing = " ".join(w for w in [*adjectives, shape] if w)
    return template.replace("{a thing}", _with_article(thing)).replace("{thing}", thing)


def sample(rng: np.random.Generator, labels: np.ndarray, *, empty: float = EMPTY, unsaid: float = UNSAID):
    """Captions for labels (n, 3): list of n strings and said (n, 3) bool, which attributes each one
    states.
    """
    captions, said = [], rng.random((len(labels), 3)) >= unsaid
    for row, mask in zip(labels, said, strict=True):
        if rng.random() < empty:
            mask[:] = False
            captions.append("")
            continue
        picked = [
            rng.choice(values[i].words) if m else ""
            for values, i, m in zip(ATTRIBUTES.values(), row, mask, strict=True)
        ]
        picked[0] = picked[0] or rng.choice(NOUNS)
        captions.append(fill(TEMPLATES[rng.integers(len(TEMPLATES))], *picked, bool(rng.random() < 0.7)))
    return captions, said


def canonical(labels: np.ndarray) -> list[str]:
    """One plain caption per row of labels (n, 3): "a striped red star"."""
    names = [[v.name for v in values] for values in ATTRIBUTES.values()]
    return [fill("{a thing}", *(names[k][i] for k, i in enumerate(row))) for row in np.asarray(labels)]


def every_combination(repeats: int, rng: np.random.Generator, held_out: bool | None = None):
    """`repeats` fully stated captions for each of the 192 combinations, words drawn from the
    classes.

    held_out None draws from all words, False from those an erasure prompt may use, True from the
    others. Returns (captions, labels (n, 3)).
    """
    labels = np.tile(COMBINATIONS, (repeats, 1))
    pick = {None: lambda v: v.words, False: lambda v: v.seen, True: lambda v: v.held_out}[held_out]
    captions = [
        fill(
            "{a thing}",
            *(rng.choice(pick(values[i])) for values, i in zip(ATTRIBUTES.values(), row, strict=True)),
        )
        for row in labels
    ]
    return captions, labels
