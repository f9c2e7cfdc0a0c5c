"""What a training is of: where its pictures, captions and tokens come from, and how its results are read.

The stages are the same for every embedded world; this is what differs. `WORLD` is the world's.
"""

import dataclasses
import functools
import pathlib
import types
from collections.abc import Callable, Mapping

import numpy as np

from aegis_jax.world import captions, clip, judge, renderer, tokenizer
from aegis_jax.world.concepts import ATTRIBUTES
from tools.world import architectures

CARD = """---
library_name: diffusers
license: apache-2.0
tags: [stable-diffusion, aegis_jax]
---

# The embedded world of aegis_jax

A small Stable Diffusion for measuring concept erasure on any laptop: 32x32 images of one object, 8
shapes, 6 colours and 4 textures, drawn by aegis_jax's own renderer. No downloaded data, no
downloaded weights. Beside the pipeline lie `judge/`, `second_judge/` (classifiers of the three
attributes) and `clip/` (CLIP's image tower and projection; its text tower is the text encoder), which diffusers
ignores. How it was trained, with times and accuracies: `world.json`.
"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The subject of a training.

    name: of the exported folder and its record; command: how it is trained. architectures: a module with the configs of
    tools/world/architectures.py. attributes: {name: values} that judges tell apart, in the order of labels (n, k).
    draw(rng, n) -> (uint8 images (n, 32, 32, 3), labels). captions(rng, labels) -> (texts, what they say), with
    `clip_captions` as further arguments for CLIP. true_of(said, labels) -> (n, n) bool, caption j is true of picture i.
    encode(texts) -> ids (n, L), the first `longest` of which hold any caption. survives: attributes that a picture may
    still show when its parts are shuffled. material(shop, vae_params) -> the judges' pictures. class_ids: of a
    `clip.Scorer`. write_tokenizer(folder). card: the README.md; files: {name: text} beside it.
    """

    name: str
    command: str
    architectures: types.ModuleType
    attributes: Mapping[str, tuple]
    draw: Callable
    captions: Callable
    clip_captions: Mapping[str, object]
    true_of: Callable
    encode: Callable
    longest: int
    survives: tuple[int, ...]
    material: Callable
    class_ids: Callable
    write_tokenizer: Callable[[pathlib.Path], None]
    card: str
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def judge(self, model) -> judge.Judge:
        """A judge of these attributes around a model."""
        return judge.Judge(model, self.attributes)


def _draw(rng: np.random.Generator, n: int):
    label = renderer.labels(rng, n)
    return renderer.render(rng, label), label


def _true_of(said: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return (~said[None] | (labels[None] == labels[:, None])).all(-1)


@functools.cache
def _vocabulary() -> dict[str, int]:
    return tokenizer.build(captions.words())[0]


def _encode(texts: list[str]) -> np.ndarray:
    return tokenizer.encode(texts, _vocabulary())


def _material(shop, vae_params) -> dict:
    from tools.world import judges

    return judges.material(shop, vae_params)


WORLD = Subject(
    name="world",
    command="python -m tools.world.train",
    architectures=architectures,
    attributes=ATTRIBUTES,
    draw=_draw,
    captions=captions.sample,
    clip_captions={"empty": 0.0, "unsaid": 0.35},  # single words must mean something on their own
    true_of=_true_of,
    encode=_encode,
    longest=captions.LONGEST + 2,
    survives=(1, 2),
    material=_material,
    class_ids=clip.Scorer.class_ids,
    write_tokenizer=lambda folder: tokenizer.write(folder, captions.words()),
    card=CARD,
)
