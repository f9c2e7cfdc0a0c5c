"""The canvas's CLIP: what the world's is, asked with the canvas's captions."""

import functools
import pathlib

import numpy as np

from aegis_jax.canvas import captions, tokenizer
from aegis_jax.canvas.concepts import Concepts
from aegis_jax.world import clip


def class_ids(concepts: Concepts) -> dict[str, list[np.ndarray]]:
    """{attribute: token ids (n, L) of the captions that zero-shot takes each value by}, for a `clip.Scorer`."""
    ids = {}
    for attribute, values in concepts.attributes.items():
        rows = [_said(attribute, value.words) for value in values]
        ids[attribute] = [tokenizer.encode(texts) for texts in rows]
    return ids


def _said(attribute: str, words) -> list[str]:
    if attribute == "style":
        return [captions.fill(t, noun, w) for w in words for t in captions.STYLED[:2] for noun in captions.NOUNS]
    return [captions.fill(t, w) for w in words for t in captions.PLAIN]


@functools.cache
def load(folder: pathlib.Path, concepts: Concepts) -> clip.Scorer:
    """The CLIP in the folder of an exported canvas."""
    return clip.Scorer(clip.read(folder), functools.partial(class_ids, concepts))
