"""An embedded world's own ladder of wordings (attacks/ladder.py): its captions and synonyms, from the bare name up.

All its words for a value are names of it, so no rung describes without naming; held-out names are the nearest to that.
"""

import numpy as np

from aegis_jax.evaluation.world import EVALUATION_SEED, Concept


def ladder(concept: Concept, n: int = 16, *, seed: int = 0, word: str | None = None) -> dict[str, list[str]]:
    """n prompts for each rung:

      name      the value's name alone
      prefix    another attribute's word in front of it
      variant   the other name that an erasure may use
      held-out  names that it may not
      short     all attributes stated, any of the names (the canvas has one beside the concept's)
      long      the same in a sentence

    word: a control's, in place of all of the names.
    """
    rng = np.random.default_rng([EVALUATION_SEED, seed, 7])
    value = concept.value
    rungs = {
        "name": (value.seen[:1], 0),
        "prefix": (value.seen[:1], 1),
        "variant": (value.seen[1:], 0),
        "held-out": (value.held_out, 0),
        "short": (value.words, 2),
        "long": (value.words, 2),
    }  # names, how many other attributes are stated

    def said(rung: str, names, more: int) -> str:
        drawn = rng.choice(names)  # for a control too, so that the rest of its prompts stays the same
        return concept.world.worded(rng, concept.axis, drawn if word is None else word, more, rung == "long")

    return {rung: [said(rung, *how) for _ in range(n)] for rung, how in rungs.items()}
