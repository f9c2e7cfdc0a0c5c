"""The world's own ladder of wordings (attacks/ladder.py): its captions and synonyms, from the bare name up.

All its words for a value are names of it, so no rung describes without naming; held-out names are the nearest to that.
"""

import numpy as np

from aegis_jax.evaluation.world import EVALUATION_SEED, Concept
from aegis_jax.world import captions, concepts

PREFIX, LATE = "an image of {a thing}", "a picture of {a late}"


def ladder(concept: Concept, n: int = 16, *, seed: int = 0, word: str | None = None) -> dict[str, list[str]]:
    """n prompts for each rung:

      name      the value's name alone
      prefix    another attribute's word in front of it
      variant   the other name that an erasure may use
      held-out  names that it may not
      short     all attributes stated, any of the names
      long      the same in a sentence

    word: a control's, in place of all of the names.
    """
    rng = np.random.default_rng([EVALUATION_SEED, seed, 7])
    value = concept.value
    rungs = {
        "name": (value.seen[:1], 0, PREFIX),
        "prefix": (value.seen[:1], 1, PREFIX),
        "variant": (value.seen[1:], 0, PREFIX),
        "held-out": (value.held_out, 0, PREFIX),
        "short": (value.words, 2, "{a thing}"),
        "long": (value.words, 2, LATE),
    }  # names, how many other attributes are stated, template
    return {rung: [_said(rng, concept, word, *how) for _ in range(n)] for rung, how in rungs.items()}


def _said(rng, concept: Concept, word: str | None, names, more: int, template: str) -> str:
    """One of the names, or `word`, with the words of `more` other attributes."""
    drawn = rng.choice(names)  # for a control too, so that the rest of its prompts stays the same
    words, others = ["", "", ""], [axis for axis in range(3) if axis != concept.axis]
    for axis in rng.permutation(others)[:more]:
        values = list(concepts.ATTRIBUTES.values())[axis]
        words[axis] = rng.choice(values[rng.integers(len(values))].seen)
    words[concept.axis] = drawn if word is None else word
    words[0] = words[0] or rng.choice(captions.NOUNS)
    return captions.fill(template, *words)
