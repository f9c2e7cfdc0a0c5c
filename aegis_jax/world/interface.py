"""What evaluation asks of an embedded world, so that it is written once for all of them.

`aegis_jax.world.embedded` and `aegis_jax.canvas.embedded` have an instance each; `aegis_jax.worlds` finds them by name.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from aegis_jax.world.clip import Scorer
from aegis_jax.world.concepts import Value
from aegis_jax.world.judge import Judge


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedWorld:
    """An embedded world: its values, prompts for them, and who says what a picture shows.

    name: what `load_pipeline` and `--model` call it. attributes: {name: its values}, each with seen and held-out words;
    labels (n, attributes) are indices into them. combinations (m, attributes): what is drawn. nouns: what stands in
    where a prompt names no thing. domains: the attributes that a prompt can state apart from each other (a thing of the
    canvas has its subgroup with it).

    named(text)              [(word as written, attribute, index)] of the words that name a value
    prompt(rng, axis, word)  a prompt that names `word` of the attribute `axis`; others by seen words, or left open
    said(rng, row)           a prompt that states all of a row of labels, in seen words
    worded(rng, axis, word, more[, late])    one that names `word` and up to `more` values of other domains, in seen
                             words; late: these behind the noun
    left_open(rng, axis)     one that states the other attributes and says nothing of that one
    shown(phrase, count[, gone])     `count` prompts for a picture, of what a phrase names, each with other values for
                             the rest, none of those in `gone`, {(attribute, index)}
    beside(attribute, index[, gone]) two other values of the attribute that a picture shows as kept, by index; likewise
    rings(attribute, index)  {how far: indices} of all others, nearest first
    judge(name)              "judge" measures, "second_judge" checks it
    clip()                   its CLIP
    render(rng, labels)      uint8 pictures (n, H, W, 3) of labels (n, attributes) by what it learnt from; None where
                             the package does not have that
    """

    name: str
    attributes: Mapping[str, tuple[Value, ...]]
    combinations: np.ndarray
    nouns: tuple[str, ...]
    domains: tuple[str, ...]
    named: Callable[[str], list[tuple[str, str, int]]]
    prompt: Callable[[np.random.Generator, int, str], str]
    said: Callable[[np.random.Generator, np.ndarray], str]
    left_open: Callable[[np.random.Generator, int], str]
    worded: Callable[..., str]
    shown: Callable[..., tuple[str, ...]]
    beside: Callable[..., tuple[int, ...]]
    rings: Callable[[str, int], dict[str, tuple[int, ...]]]
    judge: Callable[[str], Judge]
    clip: Callable[[], Scorer]
    render: Callable[[np.random.Generator, np.ndarray], np.ndarray] | None = None
