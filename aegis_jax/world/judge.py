"""Judges: classifiers that say which shape, colour and texture an image shows, or none of these.

Two of different architecture and seed: `judge` (strided convolutions, places kept) measures;
`second_judge` (residual, averaged over places) checks that its opinion is not an accident of its
training.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from aegis_jax.models.model import Model, abstract, bind, flatten, unflatten
from aegis_jax.world import WEIGHTS
from aegis_jax.world.concepts import ATTRIBUTES, NONE
from aegis_jax.world.towers import Headed

CLASSES = tuple(len(values) + 1 for values in ATTRIBUTES.values())  # the last of each is "none of these"
_CONV = {
    "architecture": "conv",
    "widths": [32, 64, 96, 128],
    "strides": [2, 1, 2, 2],
    "features": 128,
}
_RESIDUAL = {
    "architecture": "residual",
    "widths": [32, 64, 128],
    "blocks": [1, 2, 1],
    "features": 128,
}
CONFIGS = {name: c | {"outputs": sum(CLASSES)} for name, c in (("judge", _CONV), ("second_judge", _RESIDUAL))}


def logits(graph, params, images) -> tuple:
    """images (B, 32, 32, 3) in [-1, 1] -> logits per attribute, (B, 9), (B, 7), (B, 5); the last is
    "none".
    """
    return tuple(jnp.split(bind(graph, params)(images)[1], np.cumsum(CLASSES)[:-1], axis=-1))


_logits = jax.jit(logits, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained judge; call it on uint8 images (n, 32, 32, 3)."""

    model: Model

    def __call__(self, images, batch: int = 256) -> dict:
        """{"shape" | "colour" | "texture": (n,) int, the value's index or -1 for none of these;
        "probabilities": {attribute: (n, values + 1) float32, the last column "none"}}."""
        images = np.asarray(images)
        parts = []
        for i in range(0, len(images), batch):
            x = images[i : i + batch]
            padded = np.concatenate([x, np.zeros((-len(x) % batch, *x.shape[1:]), x.dtype)])  # one compiled shape
            out = _logits(self.model.graph, self.model.params, padded.astype(np.float32) / 127.5 - 1)
            parts.append([np.asarray(jax.nn.softmax(o))[: len(x)] for o in out])
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


def save(judge: Judge, folder: pathlib.Path) -> None:
    """Write config.json and model.safetensors (fp16, our own layout and names)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(judge.model.config, indent=2) + "\n")
    save_file(
        {k: np.asarray(v, np.float16) for k, v in flatten(judge.model.params).items()},
        folder / "model.safetensors",
    )


@functools.cache
def load(name: str = "judge", folder: pathlib.Path | None = None) -> Judge:
    """The judge `name` ("judge", "second_judge") of the embedded world, or of `folder`."""
    folder = (folder or WEIGHTS) / name
    config = json.loads((folder / "config.json").read_text())
    model = abstract(Headed, config)
    params = {k: jnp.asarray(v, jnp.float32) for k, v in load_file(folder / "model.safetensors").items()}
    return Judge(dataclasses.replace(model, params=unflatten(params)))
