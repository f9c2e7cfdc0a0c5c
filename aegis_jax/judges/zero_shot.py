"""`clip:FOLDER`: which of several texts a CLIP finds nearest to a picture (zero-shot classification), in Flax."""

import pathlib

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import hub
from aegis_jax.io.clip import Clip, load_clip
from aegis_jax.judges import take
from aegis_jax.judges.judge import Judge, digest

LABELS = "labels.txt"


def load(what: str, options: dict[str, str]) -> Judge:
    """Options: labels, a file (by default labels.txt in the folder); top, as of `hf:`; revision, of a hub id."""
    values = take(options, labels=str, top=int, revision=str)
    if not what:
        raise AegisError("say which: clip:FOLDER, or a hub id, clip:NAME/NAME")
    clip = load_clip(what, revision=values.get("revision"))
    file = hub.expand(values["labels"]) if "labels" in values else clip.weights[0].parent / LABELS
    if not file.is_file():
        raise AegisError(f"{file} is missing: wanted what to choose from, a label a line; ?labels=FILE names another")
    texts = read_labels(file)
    vectors = class_vectors(clip, texts)

    def compute(images: np.ndarray) -> np.ndarray:
        scores = clip.scale * (clip.embed_images(images) @ vectors.T).astype(np.float64)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True)

    return Judge(
        name="clip:" + what + ("?" + "&".join(f"{key}={text}" for key, text in options.items()) if options else ""),
        labels=tuple(texts),
        compute=compute,
        digest=digest(clip.weights),
        top=values.get("top", 1),
        features=clip.image_features,
        about={"texts": texts, "labels_sha256": digest([file]), "settings_sha256": digest(clip.settings)},
    )


def read_labels(file: pathlib.Path) -> dict[str, list[str]]:
    """{label: texts} of a file with a label a line, or label, tab and the text that stands for it.

    A label that has several lines is the mean of its texts. Raises `AegisError` for fewer than two labels, and for a
    text without one.
    """
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise AegisError(f"{file} is not UTF-8 ({error}): save it as that") from None
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        label, _, text = (part.strip() for part in line.partition("\t"))
        if not label:
            raise AegisError(f"{file}, line {number}: no label before the tab")
        texts.setdefault(label, []).append(text or label)
    if len(texts) < 2:
        raise AegisError(f"{file} has {len(texts)} labels, wanted at least two to choose from")
    return texts


def class_vectors(clip: Clip, texts: dict[str, list[str]]) -> np.ndarray:
    """Unit vectors (labels, E): of each label the mean of its texts' unit vectors."""
    vectors = clip.embed_texts([text for row in texts.values() for text in row])
    ends = np.cumsum([len(row) for row in texts.values()])
    means = np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])])
    return means / np.linalg.norm(means, axis=1, keepdims=True)
