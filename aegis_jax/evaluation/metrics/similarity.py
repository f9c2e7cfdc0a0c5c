"""What CLIP says of images: how well they fit their prompts, and which of several words they are nearest to.

Vectors are unit vectors of one CLIP, as `embedder` gives them. A CLIP score is good to compare models on the same
prompts with the same CLIP; it moves little (SD 1.4 and everything erased from it lies between .28 and .31 by ViT-B/32),
so that its standard error stands beside it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.evaluation.interval import share
from aegis_jax.io.hub import EMBEDDED
from aegis_jax.judges.judge import digest

# COCO's categories, of which CARE's code takes its words; it adds "stars" and "freshwater".
COCO_OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """A CLIP as the figures need it.

    Attributes:
      images: uint8 (n, H, W, 3) -> unit vectors (n, E). texts: n texts -> unit vectors (n, E).
      features: uint8 (n, H, W, 3) -> (n, E), for the Frechet distance.
      digest: sha256 of the weights, and of a folder's configs and tokenizer with them (`judges.judge.digest`).
    """

    images: Callable[[np.ndarray], np.ndarray]
    texts: Callable[[list[str]], np.ndarray]
    features: Callable[[np.ndarray], np.ndarray]
    digest: str


def embedder(source, *, revision: str | None = None) -> Embedder:
    """An embedded world's own CLIP for its name, else that of a folder or hub id (io/clip.py)."""
    if str(source) not in EMBEDDED:
        from aegis_jax.io.clip import load_clip

        clip = load_clip(source, revision=revision)
        return Embedder(clip.embed_images, clip.embed_texts, clip.image_features, digest(clip.weights + clip.settings))
    from aegis_jax import worlds
    from aegis_jax.io.pipeline import load_pipeline
    from aegis_jax.judges.world import own_size

    tokenizer, scorer = load_pipeline(source).tokenizer, worlds.find(str(source)).clip()
    weights = [EMBEDDED[str(source)] / name / "model.safetensors" for name in ("clip", "text_encoder")]
    texts = lambda texts: scorer.embed_texts(tokenizer.ids(texts))  # noqa: E731
    images, features = (lambda x, of=of: of(own_size(x)) for of in (scorer.embed_images, scorer.features))
    return Embedder(images, texts, features, digest(weights))


def clip_score(images, texts) -> dict:
    """The mean cosine of image i and text i, (n, E) each: "mean", "standard_error" (over images) and "n".

    Others give 100 times this, or count negative cosines as 0.
    """
    cosines = _rowwise(images, texts)
    n = len(cosines)
    error = float(cosines.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return {"mean": float(cosines.mean()), "standard_error": error, "n": n}


def nearest(images, words) -> np.ndarray:
    """Which of the words (k, E) each image (n, E) is nearest to, (n,)."""
    return (np.asarray(images) @ np.asarray(words).T).argmax(1)


def care(images, words, target: int) -> dict:
    """CARE's score (ReCARE, ICLR 2026): the share of images nearest to the word `target` of all words (k, E).

    The images are of the concept's prompt by the erased model; the word is one that goes with the concept and is
    harmless (for nudity: person), the others are a common list (in the authors' code `COCO_OBJECTS` and two
    more). It tells whether the erasure took that word along.
    """
    return share(int((nearest(images, words) == target).sum()), len(images))


def _rowwise(images, texts) -> np.ndarray:
    images, texts = (np.asarray(rows, np.float64) for rows in (images, texts))
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise AegisError(f"vectors of shapes {images.shape} and {texts.shape}, wanted a text for each image")
    return (images * texts).sum(1)
