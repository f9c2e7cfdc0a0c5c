"""Judges: classifiers that say which shape, colour and texture an image shows, or none of these.

Two of different architecture and seed: `judge` (strided convolutions) measures; `second_judge` (residual) checks that
its opinion is not an accident of its training. Each is the mean opinion of four networks that differ in their first
weights, since even two trainings of one architecture differ about odd images (docs/world.md).
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from aegis_jax.errors import AegisError
from aegis_jax.models.model import Model, abstract, bind, unflatten
from aegis_jax.world import WEIGHTS
from aegis_jax.world.concepts import ATTRIBUTES, NONE
from aegis_jax.world.towers import Committee

CLASSES = tuple(len(values) + 1 for values in ATTRIBUTES.values())  # the last of each is "none of these"
NAMES = ("judge", "second_judge")
FEW = 16  # images, as an attack looks at on its way: padded to a whole batch they would take twenty times as long


def logits(graph, params, images) -> tuple:
    """images (B, 32, 32, 3) in [-1, 1] -> logits per attribute, (members, B, 9), (members, B, 7), (members, B, 5); the
    last is "none".
    """
    return tuple(jnp.split(bind(graph, params)(images), np.cumsum(CLASSES)[:-1], axis=-1))


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(graph, params, images) -> tuple:
    return tuple(jax.nn.softmax(scores).mean(0) for scores in logits(graph, params, images))


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained judge; call it on uint8 images (n, 32, 32, 3)."""

    model: Model

    def __call__(self, images, batch: int = 256) -> dict:
        """{"shape" | "colour" | "texture": (n,) int, the value's index or -1 for none of these;
        "probabilities": {attribute: (n, values + 1) float32, the last column "none"}}."""
        images = np.asarray(images)
        batch = min(batch, FEW) if len(images) <= FEW else batch
        parts = []
        for i in range(0, len(images), batch):
            x = images[i : i + batch]
            padded = np.concatenate([x, np.zeros((-len(x) % batch, *x.shape[1:]), x.dtype)])  # two compiled shapes
            out = _probabilities(self.model.graph, self.model.params, padded.astype(np.float32) / 127.5 - 1)
            parts.append([np.asarray(p)[: len(x)] for p in out])
        probabilities = {a: np.concatenate([p[k] for p in parts]) for k, a in enumerate(ATTRIBUTES)}
        answer = {}
        for attribute, p in probabilities.items():
            best = p.argmax(-1)
            answer[attribute] = np.where(best == p.shape[-1] - 1, NONE, best)
        return answer | {"probabilities": probabilities}

    def accuracy(self, images, label) -> dict[str, float]:
        """Share of images on which each attribute's answer equals label (n, 3)."""
        answer = self(images)
        return {a: float((answer[a] == label[:, k]).mean()) for k, a in enumerate(ATTRIBUTES)}


@functools.cache
def load(name: str = "judge", folder: pathlib.Path | None = None) -> Judge:
    """The judge `name` ("judge", "second_judge") of the embedded world, or of `folder`.

    Raises `AegisError` for one of an earlier version.
    """
    folder = (folder or WEIGHTS) / name
    config = json.loads((folder / "config.json").read_text())
    if "members" not in config:
        raise AegisError(f"{folder}: a judge of one network, made by an earlier version: train the world again")
    model = abstract(Committee, config)
    params = {k: jnp.asarray(v, jnp.float32) for k, v in load_file(folder / "model.safetensors").items()}
    return Judge(dataclasses.replace(model, params=unflatten(params)))
