"""Captions of the canvas: templates over the words of `concepts`, with thing or style left unsaid now and then."""

import numpy as np

from aegis_jax.canvas.concepts import BROADER, STYLES, SUBGROUPS, Concepts, catalogue

# {a thing} brings its article where it wants one, {thing} stands bare.
STYLED = (
    "{a style} drawing of {a thing}",
    "{a thing} drawn by {style}",
    "{thing} in the style of {style}",
    "{thing} {style} style",
    "{a thing} by {style}",
    "a picture of {a thing} by {style}",
    "{style} {thing}",
)
PLAIN = (
    "{thing}",
    "{a thing}",
    "{a thing}",
    "a drawing of {a thing}",
    "a picture of {a thing}",
    "the {thing}",
    "an emoji of {a thing}",
)
NOUNS = ("thing", "object", "something")  # stands in where nothing else is said of the thing
LONGEST = 8  # words
EMPTY = 0.1  # share of empty captions, for classifier-free guidance
UNSAID = 0.2  # probability that the style is left unsaid
# What a caption calls the thing: by its own word, its subgroup's, one broader still, or not at all.
OWN, KIN, BROAD, OPEN = range(4)
NAMING = (0.8, 0.08, 0.04, 0.08)
_FILLERS = sorted(set(" ".join(STYLED + PLAIN).replace("{", " ").replace("}", " ").split()) | {"an", *NOUNS})
_SINGULAR = frozenset("bus omnibus cactus octopus hibiscus crocus fungus helianthus iris papyrus dress".split())
_MASS = frozenset(
    "something corn maize sweetcorn cheese cheddar brie gouda bread toast sourdough sushi sashimi nigiri maki "
    "ramen rice fire lava snow thunder lightning honey nectar denim candy wine merlot vino vermouth coffee beer "
    "ale lager champagne prosecco cava bubbly sealife marine fowl avian plumage music clothing apparel weather "
    "transport vegetation flora greenery flight aviation athletics gaming gambling lighting stationery science "
    "hardware produce food soccer tennis basketball baseball softball hardball bowling boxing hockey footy futbol "
    "guacamole guac popcorn popped halloween christmas xmas noel tinsel sunshine sunny lunar graduation blaze "
    "booze electronics paperwork homeware floral feathered reptilian fruity aquatic oceanic scaly airborne flying "
    "maritime scientific musical sporting domestic gridiron surf candlelight microscopy steam autumn sailing rowing "
    "drumming parchment landscape terrain scenery wimbledon".split()
)


def words() -> list[str]:
    """Every word that a caption of the whole catalogue can have, in a fixed order."""
    values = [*STYLES.values(), *SUBGROUPS.values(), *(thing.value for thing in catalogue())]
    broader = [w for row in BROADER.values() for w in row]
    return list(dict.fromkeys([*_FILLERS, *broader, *(w for value in values for w in value.words)]))


def with_article(word: str) -> str:
    """ "a fox", "an owl", "grapes": English, by rule where a rule does and by list where not."""
    plural = word.endswith("s") and not word.endswith("ss") and word not in _SINGULAR
    if plural or word in _MASS:
        return word
    return f"{_indefinite(word)} {word}"


def _indefinite(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith(("uni", "uku")) else "a"


def fill(template: str, thing: str, style: str = "") -> str:
    """The caption for given words; a template of `STYLED` wants both, of `PLAIN` the first alone."""
    words = {"{thing}": thing, "{a thing}": with_article(thing)}
    if style:  # a name: "an ellis drawing", never bare
        words |= {"{style}": style, "{a style}": f"{_indefinite(style)} {style}"}
    for place, word in words.items():
        template = template.replace(place, word)
    return template


def phrase(thing: str, style: str = "") -> str:
    """The plainest caption: "a twemoji drawing of a fox", "a fox"."""
    return fill(STYLED[0] if style else "{a thing}", thing, style)


def sample(rng: np.random.Generator, labels: np.ndarray, concepts: Concepts, *, empty: float = EMPTY,
           unsaid: float = UNSAID, naming=NAMING):  # fmt: skip
    """Captions for labels (n, 3) of thing, style and subgroup, all values' words alike.

    Returns a list of n strings and said (n, 2) int: how the thing is named (`OWN`, `KIN`, `BROAD`, `OPEN`) and whether
    the style is.
    """
    things, styles, subgroups = concepts.attributes.values()
    broader = list(BROADER.values())
    captions, said = [], np.zeros((len(labels), 2), int)
    for row, mark in zip(labels, said, strict=True):
        mark[:] = OPEN, False
        if rng.random() < empty:
            captions.append("")
            continue
        how, styled = rng.choice(len(naming), p=naming), rng.random() >= unsaid
        of = concepts.broader_of[row[2]]
        how = KIN if how == BROAD and of < 0 else how
        pool = (things[row[0]].words, subgroups[row[2]].words, broader[of], NOUNS)[how]
        thing, style = rng.choice(pool), rng.choice(styles[row[1]].words) if styled else ""
        mark[:] = how, styled
        templates = STYLED if styled else PLAIN
        captions.append(fill(templates[rng.integers(len(templates))], thing, style))
    return captions, said


def true_of(said: np.ndarray, labels: np.ndarray, concepts: Concepts) -> np.ndarray:
    """(n, n) bool: caption j is true of picture i, for what `sample` said of labels (n, 3)."""
    how, styled = said.T
    broader = concepts.broader_of[labels[:, 2]]
    same = np.stack([
        labels[:, None, 0] == labels[None, :, 0],
        labels[:, None, 2] == labels[None, :, 2],
        broader[:, None] == broader[None, :],
        np.ones((len(labels),) * 2, bool),
    ])  # fmt: skip
    thing = np.take_along_axis(same, how[None, None, :].repeat(len(labels), 1), axis=0)[0]
    return thing & (~styled.astype(bool)[None, :] | (labels[:, None, 1] == labels[None, :, 1]))
