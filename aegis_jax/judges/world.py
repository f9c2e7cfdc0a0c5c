"""The judges of an embedded world: its attributes, a group of labels each (the world's: shape, colour, texture)."""

import functools

import jax
import numpy as np

from aegis_jax import worlds
from aegis_jax.errors import AegisError
from aegis_jax.io.hub import EMBEDDED, locate
from aegis_jax.judges import take
from aegis_jax.judges.judge import Judge, digest
from aegis_jax.models.model import bind
from aegis_jax.world import judge

MEMBERS = {"": "judge", "second": "second_judge"}


def load(what: str, options: dict[str, str], within: str = "world") -> Judge:
    """`world` measures, `world:second` is the check of another architecture and seed; `within`: whose."""
    take(options)
    if what not in MEMBERS:
        raise AegisError(f"the {within} has the judges {' and '.join(within + ':' * bool(m) + m for m in MEMBERS)}")
    locate(within)  # says what to do where its weights are not here
    judged = worlds.find(within).judge(MEMBERS[what])
    # "no shape" is an answer like the others: an image that shows none of the values.
    named = judged.attributes.items()
    groups = tuple((*(value.name for value in values), f"no {attribute}") for attribute, values in named)
    return Judge(
        name=f"{within}:{what}" if what else within,
        labels=tuple(label for group in groups for label in group),
        compute=lambda images: np.concatenate(list(judged(own_size(images))["probabilities"].values()), axis=1),
        digest=digest([EMBEDDED[within] / MEMBERS[what] / "model.safetensors"]),
        groups=groups,
        features=lambda images: _features(judged, own_size(images)),
    )


def own_size(images: np.ndarray) -> np.ndarray:
    """The images, refused if they are not of the embedded worlds' size."""
    if images.shape[1:3] != (32, 32):
        raise AegisError(f"images are {images.shape[2]}x{images.shape[1]} pixels, and the world's are 32x32")
    return images


@functools.partial(jax.jit, static_argnums=0)
def _first(graph, params, images):
    return bind(graph, params).members[0](images)[0]


def _features(judged: judge.Judge, images: np.ndarray, batch: int = 256) -> np.ndarray:
    """(n, width), of the committee's first network: the features of four side by side are no better a ruler."""
    model = judged.model
    parts = [
        np.asarray(_first(model.graph, model.params, images[i : i + batch].astype(np.float32) / 127.5 - 1))
        for i in range(0, len(images), batch)
    ]
    return np.concatenate(parts)
