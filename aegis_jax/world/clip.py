"""The world's CLIP: text tower (the pipeline's text encoder) and a convolutional image tower, trained together."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models import clip
from aegis_jax.models.model import Model, abstract, bind, unflatten
from aegis_jax.world import WEIGHTS, captions, tokenizer
from aegis_jax.world.concepts import ATTRIBUTES
from aegis_jax.world.towers import Headed


@dataclasses.dataclass(frozen=True)
class Clip:
    """Both towers. `params` holds text_model, tower and head (images), text_projection,
    logit_scale.
    """

    text: Model  # structure and config; the parameters in use are `params`
    vision: Model
    params: dict


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def text_features(model: Clip, params, ids):
    """Token ids (B, L) -> unit vectors (B, 64), read at the first end-of-text token."""
    own = {"text_model": params["text_model"]}
    hidden = clip.encode(model.text.graph, own, clip.embed(model.text.graph, own, ids))
    end = jnp.argmax(ids == model.text.config["eos_token_id"], axis=-1)
    pooled = hidden[jnp.arange(len(ids)), end]
    return _unit(pooled @ params["text_projection"]["kernel"])


def image_features(model: Clip, params, images):
    """Images (B, 32, 32, 3) in [-1, 1] -> features (B, 128) and unit vectors (B, 64)."""
    features, projected = bind(model.vision.graph, {name: params[name] for name in ("tower", "head")})(images)
    return features, _unit(projected)


def class_texts() -> dict[str, list[list[str]]]:
    """{attribute: for each value the captions, over its words and some templates, that zero-shot takes it by}."""
    result = {}
    for k, (attribute, values) in enumerate(ATTRIBUTES.items()):
        rows = []
        for value in values:
            texts = []
            for word in value.words:
                parts = ["", "", ""]
                parts[k] = word
                nouns = [word] if k == 0 else captions.NOUNS
                for template in ("{a thing}", "a picture of {a thing}", "the {thing}"):
                    texts += [captions.fill(template, noun, *parts[1:]) for noun in nouns]
            rows.append(texts)
        result[attribute] = rows
    return result


def _world_ids() -> dict[str, list[np.ndarray]]:
    vocab, _ = tokenizer.build(captions.words())
    return {a: [tokenizer.encode(texts, vocab) for texts in rows] for a, rows in class_texts().items()}


def class_features(model: Clip, params, ids: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """{attribute: (values, 64)}: each value's mean text vector; ids: of its captions, (n, L) each."""
    return {
        a: np.stack([_unit(text_features(model, params, each).mean(0)) for each in rows]) for a, rows in ids.items()
    }


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Zero-shot classification and the CLIP score with a trained Clip. `class_ids()`: {attribute: token ids (n, L) of
    each value's captions}."""

    model: Clip
    class_ids: Callable[[], dict[str, list[np.ndarray]]] = _world_ids

    def embed_images(self, images) -> np.ndarray:
        """uint8 (n, 32, 32, 3) -> unit vectors (n, 64)."""
        return self._images(images)[1]

    def features(self, images) -> np.ndarray:
        """uint8 (n, 32, 32, 3) -> what the image tower's last layer sees, (n, 128)."""
        return self._images(images)[0]

    def _images(self, images) -> list[np.ndarray]:
        f = jax.jit(lambda p, x: image_features(self.model, p, x.astype(jnp.float32) / 127.5 - 1))
        parts = [f(self.model.params, images[i : i + 256]) for i in range(0, len(images), 256)]
        return [np.concatenate(column) for column in zip(*parts)]

    def embed_texts(self, ids) -> np.ndarray:
        """Token ids (n, L) -> unit vectors (n, 64)."""
        return np.asarray(jax.jit(lambda p, x: text_features(self.model, p, x))(self.model.params, ids))

    def zero_shot(self, images) -> dict[str, np.ndarray]:
        """{attribute: (n,) index of the value whose captions are nearest}."""
        image, texts = self.embed_images(images), class_features(self.model, self.model.params, self.class_ids())
        return {a: (image @ t.T).argmax(-1) for a, t in texts.items()}


@functools.cache
def load(folder: pathlib.Path | None = None) -> Scorer:
    """The CLIP of the embedded world, or of the world in `folder`."""
    return Scorer(read(folder or WEIGHTS))


def read(folder: pathlib.Path) -> Clip:
    """The Clip of an exported pipeline: its text encoder, and what lies in its folder clip/."""
    text = load_pipeline(folder).text_encoder
    vision = abstract(Headed, json.loads((folder / "clip" / "config.json").read_text())["vision_config"])
    flat = {k: jnp.asarray(v, jnp.float32) for k, v in load_file(folder / "clip" / "model.safetensors").items()}
    return Clip(text, vision, text.params | unflatten(flat))
