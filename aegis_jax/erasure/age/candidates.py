"""The texts that a concept may become: near to it by their encodings, and unlike each other.

Shapes: n texts, D text width.
"""

from functools import partial

import jax
import numpy as np

from aegis_jax.erasure.aegis import words
from aegis_jax.erasure.age.config import TargetConfig
from aegis_jax.erasure.networks import Networks
from aegis_jax.errors import AegisError

_ROUNDS = 50  # of Lloyd's iteration; what is left to move after them is little


def chosen(net: Networks, tokenizer, concepts: list[str], target: TargetConfig, seed: int) -> list[list[list[int]]]:
    """For each concept the tokens of at most `centres` texts: of the `nearest` ones, by the Euclidean distance of the
    encodings at the end-of-text token, from each cluster the one nearest to its centre. No word that means any of the
    concepts is among the tokenizer's; given texts are all taken for such as may be.

    Raises `AegisError` where there are fewer than two. Where the networks are traced, as many as there can be.
    """
    if target.words:
        texts = [list(tokenizer.tokens(text)) for text in dict.fromkeys(target.words)]
    else:
        texts = [[int(i)] for i in _of_tokenizer(net, tokenizer, concepts, seed)]
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(net.text)):
        return [texts[: target.centres]] * len(concepts)
    if len(texts) < 2:
        raise AegisError(
            f"target.words: the tokenizer leaves {len(texts)} words for {concepts[0]!r} to become; name several"
        )
    states = partial(words.encodings, tokenizer, net.text_graph, net.text, length=tokenizer.model_max_length)
    of_texts = states(texts).astype(np.float64)
    return [_unlike(texts, of_texts, states([tokenizer.tokens(concept)]), target, seed) for concept in concepts]


def _of_tokenizer(net: Networks, tokenizer, concepts: list[str], seed: int) -> np.ndarray:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(net.text)):
        return np.asarray(tokenizer.word_ids, np.int32)[: words.SAMPLE]
    known = words.vocabulary(tokenizer, net.text_graph, net.text, concepts, seed)
    return np.asarray(known.words[: int(known.size)])


def _unlike(texts: list, states: np.ndarray, own: np.ndarray, target: TargetConfig, seed: int) -> list:
    order = np.argsort(np.linalg.norm(states - own, axis=1), kind="stable")[: target.nearest]
    if len(order) > target.centres:
        order = order[medoids(states[order], target.centres, np.random.default_rng(seed))]
    return [texts[i] for i in np.sort(order)]


def medoids(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices, ascending, of the points (n, D) that are nearest to the centre of each of `count` clusters (k-means from
    spread-out points, as k-means++ draws them); a cluster that has run empty is left out."""
    centres = points[rng.integers(len(points))][None]
    while len(centres) < count:
        least = _squared(points, centres).min(1)
        if not least.sum() > 0:  # no other point is left
            break
        centres = np.concatenate([centres, points[rng.choice(len(points), p=least / least.sum())][None]])
    for _ in range(_ROUNDS):
        mine = _squared(points, centres).argmin(1)
        moved = np.stack([points[mine == k].mean(0) if (mine == k).any() else at for k, at in enumerate(centres)])
        if np.array_equal(moved, centres):
            break
        centres = moved
    distances = _squared(points, centres)
    mine = distances.argmin(1)
    of_cluster = ((k, np.flatnonzero(mine == k)) for k in range(len(centres)))
    return np.sort([members[distances[members, k].argmin()] for k, members in of_cluster if len(members)])


def _squared(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances (n, count)."""
    squared = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
    return np.maximum(squared, 0.0)
