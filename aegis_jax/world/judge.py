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

NAMES = ("judge", "second_judge")
FEW = 16  # images, as an attack looks at on its way: padded to a whole batch they would take twenty times as long


def classes(attributes: dict) -> tuple[int, ...]:
    """Answers that a judge has for each attribute: its values, and as the last "none of these"."""
    return tuple(len(values) + 1 for values in attributes.values())


def logits(graph, params, images, sizes: tuple[int, ...]) -> tuple:
    """images (B, 32, 32, 3) in [-1, 1] -> logits per attribute, (members, B, size) for each of `sizes`; the last is
    "none".
    """
    return tuple(jnp.split(bind(graph, params)(images), np.cumsum(sizes)[:-1], axis=-1))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _probabilities(graph, params, images, sizes) -> tuple:
    return tuple(jax.nn.softmax(scores).mean(0) for scores in logits(graph, params, images, sizes))


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained judge; call it on uint8 images (n, 32, 32, 3). `attributes`: what it tells apart, {name: values}."""

    model: Model
    attributes: dict = dataclasses.field(default_factory=lambda: ATTRIBUTES)

    def __call__(self, images, batch: int = 256) -> dict:
        """{attribute: (n,) int, the value's index or -1 for none of these;
        "probabilities": {attribute: (n, values + 1) float32, the last column "none"}}."""
        sizes = classes(self.attributes)
        images = np.asarray(images)
        batch = min(batch, FEW) if len(images) <= FEW else batch
        parts = []
        for i in range(0, len(images), batch):
            x = images[i : i + batch]
            padded = np.concatenate([x, np.zeros((-len(x) % batch, *x.shape[1:]), x.dtype)])  # two compiled shapes
            out = _probabilities(self.model.graph, self.model.params, padded.astype(np.float32) / 127.5 - 1, sizes)
            parts.append([np.asarray(p)[: len(x)] for p in out])
        probabilities = {a: np.concatenate([p[k] for p in parts]) for k, a in enumerate(self.attributes)}
        answer = {}
        for attribute, p in probabilities.items():
            best = p.argmax(-1)
            answer[attribute] = np.where(best == p.shape[-1] - 1, NONE, best)
        return answer | {"probabilities": probabilities}

    def accuracy(self, images, label) -> dict[str, float]:
        """Share of images on which each attribute's answer equals label (n, 3)."""
        answer = self(images)
        return {a: float((answer[a] == label[:, k]).mean()) for k, a in enumerate(self.attributes)}


@functools.cache
def load(name: str = "judge", folder: pathlib.Path | None = None) -> Judge:
    """The judge `name` ("judge", "second_judge") of the embedded world, or of `folder`.

    Raises `AegisError` for one of an earlier version.
    """
    return read((folder or WEIGHTS) / name, ATTRIBUTES)


def read(folder: pathlib.Path, attributes: dict) -> Judge:
    """The judge whose config and weights lie in `folder`. Raises `AegisError` for one of an earlier version."""
    config = json.loads((folder / "config.json").read_text())
    if "members" not in config:
        raise AegisError(f"{folder}: a judge of one network, made by an earlier version: train the world again")
    model = abstract(Committee, config)
    params = {k: jnp.asarray(v, jnp.float32) for k, v in load_file(folder / "model.safetensors").items()}
    return Judge(dataclasses.replace(model, params=unflatten(params)), attributes)
