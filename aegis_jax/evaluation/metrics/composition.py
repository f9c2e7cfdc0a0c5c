"""On an embedded world: several attributes at once, in prompts with and without the erased value; their UA, IRA, CRA.

`evaluation.world.measure` counts attributes one by one. Erasures hurt first where a prompt asks for several things
(Six-CD's in-prompt score, "Erasure or Erosion"), and a picture counts there only if all of them are right. What stands
beside the concept in a prompt are its co-occurring words.
"""

import numpy as np

from aegis_jax.diffusion.sample import sample
from aegis_jax.evaluation.interval import share
from aegis_jax.evaluation.metrics.canvas import accuracies
from aegis_jax.evaluation.world import EVALUATION_SEED, Concept, noise_seed, other_prompts
from aegis_jax.judges.judge import Judge
from aegis_jax.world.quality import GUIDANCE, STEPS

_WITH, _WITHOUT = 8, 9  # kinds of start noise


def full_prompts(concept: Concept, n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """n prompts that state all attributes, the concept among them, in seen words, balanced; labels (n, attributes)."""
    rng = np.random.default_rng([EVALUATION_SEED, seed, 5])
    rows = concept.world.combinations
    rows = rows[rows[:, concept.axis] == concept.index]
    labels = np.concatenate([rng.permutation(rows) for _ in range(-(-n // len(rows)))])[:n]
    return [concept.world.said(rng, row) for row in labels], labels


def composition(pipeline, concept: Concept, judge: Judge, *, n: int = 200, seed: int = 0) -> dict[str, dict]:
    """Shares with count, n and interval, of n images of either kind. `judge`: of the world or the world's second.

    Attributes are the concept's own and the world's other domains (interface.py).

    rest            prompts that state the concept and the others: of the others, those that are right
    rest_together   likewise: all of them are right
    together        prompts that state another value and the others: all of it is right
    UA, IRA, CRA, CRA_retained   as `canvas.accuracies` has them, attributes as domains; half of the images ask for
                    the concept, where UnlearnCanvas has one in 51 or 20, so CRA_retained is the one to compare
    """
    prompts, labels = zip(full_prompts(concept, n, seed), other_prompts(concept, n, seed))
    images = [
        sample(pipeline, texts, seed=noise_seed(seed, kind), steps=STEPS, guidance=GUIDANCE)
        for texts, kind in zip(prompts, (_WITH, _WITHOUT))
    ]
    attributes = concept.world.attributes
    values = [[value.name for value in row] for row in attributes.values()]
    asked = np.array([[names[i] for names, i in zip(values, row)] for row in np.concatenate(labels)])
    answers = judge.answers(judge.probabilities(np.concatenate(images)))
    counted = [a for a in attributes if a in concept.world.domains or a == concept.attribute]
    asked, answers = (dict(zip(attributes, rows.T)) for rows in (asked, answers))
    asked, answers = ({a: rows[a] for a in counted} for rows in (asked, answers))
    right = np.stack([asked[a] == answers[a] for a in counted], axis=1)
    rest = np.delete(right[:n], counted.index(concept.attribute), axis=1)
    return {
        "rest": share(int(rest.sum()), rest.size),
        "rest_together": share(int(rest.all(1).sum()), n),
        "together": share(int(right[n:].all(1).sum()), n),
        **accuracies(asked, answers, concept.attribute, concept.value.name),
    }
