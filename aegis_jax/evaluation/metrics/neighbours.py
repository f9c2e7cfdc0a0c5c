"""Near concepts: the words most like the one that is erased, and how often each of some words is still shown.

Erasures that are too wide show in their neighbours first (EMMA, EraseBench, SPEED's look-alikes).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from aegis_jax.diffusion.conditioning import encode
from aegis_jax.diffusion.sample import sample
from aegis_jax.errors import AegisError
from aegis_jax.evaluation.interval import share
from aegis_jax.judges.judge import Judge

TOGETHER = "all"  # what `shown_rates` calls all words together


def near(pipeline, concept: str, words: Sequence[str], count: int = 5) -> list[tuple[str, float]]:
    """The `count` words most like the concept, nearest first, with their cosines.

    By the pipeline's text encoder at the end-of-text token, less the mean of all words: what every encoding has in
    common would make all cosines large. Words that are the concept itself, whatever their case, are left out; which of
    the others are its synonyms is the caller's to say, by leaving them out of the list.

    Raises `AegisError` for fewer than two other words; a text is one.
    """
    words = [words] if isinstance(words, str) else words
    others = list(dict.fromkeys(word for word in words if word.strip().lower() != concept.strip().lower()))
    if len(others) < 2:
        raise AegisError(f"{len(others)} words besides {concept!r}, wanted at least two to choose from")
    states = _ends(pipeline, [concept, *others])
    states = states - states[1:].mean(0)
    states /= np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)
    cosines = states[1:] @ states[0]
    first = np.argsort(-cosines, kind="stable")[:count]
    return [(others[k], float(cosines[k])) for k in first]


def _ends(pipeline, texts: list[str]) -> np.ndarray:
    """The encodings at each text's end, float64 (n, D)."""
    ids = pipeline.tokenizer.ids(texts)
    end = (ids == pipeline.tokenizer.eos_token_id).argmax(1)
    return np.asarray(encode(pipeline, texts).embedding, np.float64)[np.arange(len(texts)), end]


def shown_rates(
    pipeline, judge: Judge, prompts: Mapping[str, str | Sequence[str]], *, seed: int, steps: int, guidance: float
) -> dict[str, dict]:
    """{label: share of the images of its prompts that show it}, with "all" of them together.

    prompts: {label or what `Judge.find` takes for one: prompts}. Image i of all of them starts from noise i of `seed`,
    so that two models are compared on the same noise. Raises `AegisError` for a word that the judge has no label for,
    and for "all".
    """
    if TOGETHER in prompts:
        raise AegisError(f"the word {TOGETHER!r} stands for all words together: leave it out")
    labels = [judge.find(text) for text in prompts]  # before anything is sampled
    prompts = {name: [row] if isinstance(row, str) else row for name, row in prompts.items()}
    texts = [text for row in prompts.values() for text in row]
    shown = judge.shown(judge.probabilities(sample(pipeline, texts, seed=seed, steps=steps, guidance=guidance)))
    rates, start = {}, 0
    for name, label in zip(prompts, labels):
        hits = shown[start : start + len(prompts[name]), judge.labels.index(label)]
        start += len(hits)
        rates[name] = share(int(hits.sum()), len(hits))
    return rates | {TOGETHER: share(sum(row["count"] for row in rates.values()), len(texts))}
