"""The judges of the embedded world: its shapes, colours and textures, a group of labels each."""

import functools

import jax
import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.judges import take
from aegis_jax.judges.judge import Judge, digest
from aegis_jax.models.model import bind
from aegis_jax.world import WEIGHTS, judge
from aegis_jax.world.concepts import ATTRIBUTES

MEMBERS = {"": "judge", "second": "second_judge"}
# "no shape" is an answer like the others: an image that shows none of the values.
GROUPS = tuple((*(value.name for value in values), f"no {name}") for name, values in ATTRIBUTES.items())


def load(what: str, options: dict[str, str]) -> Judge:
    """`world` measures, `world:second` is the check of another architecture and seed."""
    take(options)
    if what not in MEMBERS:
        raise AegisError(f"the world has the judges {' and '.join('world' + ':' * bool(m) + m for m in MEMBERS)}")
    judged = judge.load(MEMBERS[what])
    return Judge(
        name=f"world:{what}" if what else "world",
        labels=tuple(label for group in GROUPS for label in group),
        compute=lambda images: np.concatenate(list(judged(own_size(images))["probabilities"].values()), axis=1),
        digest=digest([WEIGHTS / MEMBERS[what] / "model.safetensors"]),
        groups=GROUPS,
        features=lambda images: _features(judged, own_size(images)),
    )


def own_size(images: np.ndarray) -> np.ndarray:
    """The images, refused if they are not of the world's size."""
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
