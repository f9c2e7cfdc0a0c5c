"""On an embedded world: what an erasure keeps, beyond counting attributes: near words, Frechet distances, CLIP score.

Images are of prompts that do not ask for the erased value. Distances are to real pictures of what these prompts say,
where the world has what draws them, and to the base's own images of them from other noise; the base's own distance to
those, two draws of one model, is the floor.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from aegis_jax.diffusion.sample import sample
from aegis_jax.errors import AegisError
from aegis_jax.evaluation import world
from aegis_jax.evaluation.metrics.frechet import frechet
from aegis_jax.evaluation.metrics.neighbours import near, shown_rates
from aegis_jax.evaluation.metrics.similarity import Embedder, clip_score
from aegis_jax.evaluation.world import Concept
from aegis_jax.judges.judge import Judge
from aegis_jax.world.quality import GUIDANCE, STEPS

NEAREST = 4  # near words that are looked for where the user names none
_IMAGES, _REFERENCE, _NEAR, _REAL = range(4)


def _seed(seed: int, kind: int) -> int:
    """Of the start noise of one kind of image here, apart from all of evaluation.world's."""
    return 3_000_000 + 10 * seed + kind


def named_values(concept: Concept, texts: Sequence[str]) -> list[str]:
    """The names of values that a user wants near words of. Raises `AegisError` for what is no other value."""
    found = [world.find(text, concept.within) for text in texts]
    for text, value in zip(texts, found, strict=True):
        if value is None or value == concept:
            raise AegisError(
                f"--near {text!r}: wanted another value of the {concept.within} than {concept.value.name!r}"
            )
    return [value.value.name for value in found]


def near_values(base, concept: Concept, named: Sequence[str] = ()) -> list[str]:
    """The names of those values whose words are most like the concept's by the base's text encoder, then `named`."""
    own = concept.value.name
    names = [value.name for row in concept.world.attributes.values() for value in row if value.name != own]
    return list(dict.fromkeys([word for word, _ in near(base, own, names, NEAREST)] + list(named)))


def near_rates(pipeline, concept: Concept, words: Sequence[str], judge: Judge, *, n: int, seed: int) -> dict[str, dict]:
    """{word: share that shows it}, and "all", of some n prompts that ask for the words and not for the concept."""
    prompts, each = {}, max(1, n // len(words))
    for word in words:
        texts = world.concept_prompts(world.find(word, concept.within), 8 * each, _seed(seed, _NEAR))
        free = [text for text in texts if not set(text.split()) & set(concept.value.words)]
        prompts[word] = free[:each]
    how = {"seed": _seed(seed, _NEAR), "steps": STEPS, "guidance": GUIDANCE}
    return shown_rates(pipeline, judge, prompts, **how)


def references(base, concept: Concept, *, n: int, seed: int) -> dict[str, np.ndarray]:
    """{"real": by what the world learnt from, if it is here, "base": by the base}: uint8 (n, 32, 32, 3) each, of the
    same prompts."""
    prompts, labels = world.other_prompts(concept, n, seed)
    images = sample(base, prompts, seed=_seed(seed, _REFERENCE), steps=STEPS, guidance=GUIDANCE)
    render = concept.world.render
    real = {} if render is None else {"real": render(np.random.default_rng(_seed(seed, _REAL)), labels)}
    return real | {"base": images}


def drawn(pipeline, concept: Concept, *, n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """A model's images (n, 32, 32, 3) of the prompts that `references` are of, and the prompts."""
    prompts, _ = world.other_prompts(concept, n, seed)
    return sample(pipeline, prompts, seed=_seed(seed, _IMAGES), steps=STEPS, guidance=GUIDANCE), prompts


def featured(
    rulers: Mapping[str, Callable], images: Mapping[str, Iterable[np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """{ruler: {name: features (n, d)}} of sets of images, each in parts: for a user's memory may have no room."""
    found: dict[str, dict] = {ruler: {} for ruler in rulers}
    for name, parts in images.items():
        rows = [[of(part) for of in rulers.values()] for part in parts]
        for ruler, features in zip(rulers, zip(*rows)):
            found[ruler][name] = np.concatenate(features)
    return found


def distances(rulers: Mapping[str, Callable], images: np.ndarray, to: Mapping[str, Mapping]) -> dict[str, dict]:
    """{"frechet_RULER_NAME": {"value", "n"}} of images to the sets of features in `to` (`featured`)."""
    found = {}
    for ruler, of in rulers.items():
        mine = of(images)
        for name, theirs in to[ruler].items():
            found[f"frechet_{ruler}_{name}"] = {"value": frechet(mine, theirs), "n": len(images)}
    return found


def scored(clip: Embedder, images: np.ndarray, prompts: list[str]) -> dict:
    """The CLIP score of images and their prompts: `clip_score`'s "mean", "standard_error", "n"."""
    return clip_score(clip.images(images), clip.texts(prompts))
