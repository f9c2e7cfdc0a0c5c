"""On the world: several attributes at once, in prompts with and without the erased value.

`evaluation.world.measure` counts attributes one by one. Erasures hurt first where a prompt asks for several things
(Six-CD's in-prompt score, "Erasure or Erosion"), and a picture counts there only if all of them are right.
"""

import numpy as np

from aegis_jax.diffusion.sample import sample
from aegis_jax.evaluation.interval import share
from aegis_jax.evaluation.world import EVALUATION_SEED, Concept, noise_seed, other_prompts
from aegis_jax.judges.judge import Judge
from aegis_jax.world import captions, concepts
from aegis_jax.world.quality import GUIDANCE, STEPS

_WITH, _WITHOUT = 8, 9  # kinds of start noise


def full_prompts(concept: Concept, n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """n prompts that state all three attributes, the concept among them, in seen words, balanced; labels (n, 3)."""
    rng = np.random.default_rng([EVALUATION_SEED, seed, 5])
    rows = concepts.COMBINATIONS[concepts.COMBINATIONS[:, concept.axis] == concept.index]
    labels = np.concatenate([rng.permutation(rows) for _ in range(-(-n // len(rows)))])[:n]
    words = [[rng.choice(v[i].seen) for v, i in zip(concepts.ATTRIBUTES.values(), row)] for row in labels]
    return [captions.fill("{a thing}", *row) for row in words], labels


def composition(pipeline, concept: Concept, judge: Judge, *, n: int = 200, seed: int = 0) -> dict[str, dict]:
    """Shares with count, n and interval, of n images each. `judge`: world or world:second.

    rest            prompts that state the concept and two more: of these two, those that are right
    rest_together   likewise: both are right
    together        prompts that state three other values: all three are right
    """
    result = {}
    for prompts, kind in ((full_prompts(concept, n, seed), _WITH), (other_prompts(concept, n, seed), _WITHOUT)):
        texts, labels = prompts
        images = sample(pipeline, texts, seed=noise_seed(seed, kind), steps=STEPS, guidance=GUIDANCE)
        asked = np.stack([[v[i].name for v, i in zip(concepts.ATTRIBUTES.values(), row)] for row in labels])
        right = judge.answers(judge.probabilities(images)) == asked
        if kind == _WITHOUT:
            result["together"] = share(int(right.all(1).sum()), n)
            continue
        rest = np.delete(right, concept.axis, axis=1)
        result["rest"] = share(int(rest.sum()), rest.size)
        result["rest_together"] = share(int(rest.all(1).sum()), n)
    return result
