"""A CLIP of Hugging Face transformers (CLIPModel), read from its folder and run by our own towers."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from aegis_jax import kinds
from aegis_jax.errors import AegisError
from aegis_jax.io import convert, hub, safetensors
from aegis_jax.io.folder import read_json
from aegis_jax.io.tokenizer import Tokenizer
from aegis_jax.models import clip_model
from aegis_jax.models.model import Model, abstract

_BATCH = 32
# transformers' CLIPImageProcessor fills absent keys of a preprocessor_config.json with these; resample 3 is bicubic.
_PREPARATION = {
    "do_resize": True, "size": 224, "resample": 3, "do_center_crop": True, "crop_size": 224, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
_COLOUR = kinds.Kind(lambda v: isinstance(v, list) and len(v) == 3 and all(map(kinds.NUMBER.accepts, v)), "3 numbers")
_KINDS = {
    "resample": kinds.COUNT, "rescale_factor": kinds.POSITIVE, "image_mean": _COLOUR, "image_std": _COLOUR,
} | dict.fromkeys([name for name in _PREPARATION if name.startswith("do_")], kinds.FLAG)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Clip:
    """Both towers, the tokenizer, and what is done to pictures: preprocessor_config.json with its defaults.

    weights, settings: the files of all this.
    """

    model: Model
    tokenizer: Tokenizer
    preparation: dict
    weights: tuple[pathlib.Path, ...]
    settings: tuple[pathlib.Path, ...]

    def image_features(self, images) -> np.ndarray:
        """uint8 (n, H, W, 3) -> (n, E), as the projection gives them."""
        run = functools.partial(_image_features, self.model.graph, self.model.params)
        return _in_batches(run, lambda part: prepare(part, self.preparation), np.asarray(images))

    def embed_images(self, images) -> np.ndarray:
        """uint8 (n, H, W, 3) -> unit vectors (n, E)."""
        return _unit(self.image_features(images))

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """n texts -> unit vectors (n, E). Longer ones than the model has positions for are cut, with a warning."""
        eos = clip_model.end_of_text(self.model.config)
        run = functools.partial(_text_features, self.model.graph, self.model.params, eos=eos)
        return _unit(_in_batches(run, lambda part: part, self.tokenizer.ids(texts)))

    @property
    def scale(self) -> float:
        """What cosines are multiplied with before a softmax, as in its training."""
        return float(np.exp(np.asarray(self.model.params["logit_scale"], np.float64)))


_image_features = jax.jit(clip_model.image_features, static_argnums=0)
_text_features = jax.jit(clip_model.text_features, static_argnums=0, static_argnames="eos")


def _in_batches(run, prepared, rows) -> np.ndarray:
    """run(prepared(rows)), rows in batches of one size: the last is filled up, for one shape compiles once."""
    parts = []
    for i in range(0, len(rows), _BATCH):
        part = rows[i : i + _BATCH]
        filled = np.concatenate([part, np.repeat(part[-1:], _BATCH - len(part), axis=0)])
        parts.append(np.asarray(run(prepared(filled)))[: len(part)])
    return np.concatenate(parts)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def prepare(images: np.ndarray, how: dict) -> np.ndarray:
    """uint8 (n, H, W, 3) -> float32 as the image tower takes them, with Pillow as transformers does it."""
    if how["do_resize"]:
        size = how["size"]
        if isinstance(size, dict) and "height" in size:
            wanted = (size["width"], size["height"])
        else:
            short = size["shortest_edge"] if isinstance(size, dict) else size
            height, width = images.shape[1:3]
            wanted = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        resized = (Image.fromarray(image).resize(wanted, how["resample"]) for image in images)
        images = np.stack([np.asarray(image) for image in resized])
    if how["do_center_crop"]:
        crop = how["crop_size"]
        sides = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
        if sides[0] > images.shape[1] or sides[1] > images.shape[2]:
            raise AegisError(f"pictures are resized to {images.shape[1:3]} and cut to {sides}: wanted no larger")
        top, left = ((have - want) // 2 for have, want in zip(images.shape[1:3], sides))
        images = images[:, top : top + sides[0], left : left + sides[1]]
    x = images.astype(np.float32)
    if how["do_rescale"]:
        x = x * np.float32(how["rescale_factor"])
    if how["do_normalize"]:
        x = (x - np.array(how["image_mean"], np.float32)) / np.array(how["image_std"], np.float32)
    return x


def load_clip(source, *, revision: str | None = None) -> Clip:
    """Reads a folder, or a hub id, with config.json, safetensors, tokenizer and, usually, preprocessor_config.json.

    Raises `AegisError` for whatever is no CLIPModel or does not fit its config.
    """
    folder = hub.locate_model(source, revision=revision)
    config = read_json(folder / "config.json")
    if config.get("architectures", ["CLIPModel"]) != ["CLIPModel"]:
        raise AegisError(f"{folder} holds a {config['architectures']}, wanted a CLIPModel with both towers")
    model = abstract(clip_model.CLIPModel, config)
    headers = tuple(safetensors.read_header(path) for path in hub.model_weights(folder))
    origins, problems, _ = convert.match("clip", model, headers)
    convert.refuse(problems, folder)
    tables = model.params["text_model"]["embeddings"]
    tokenizer = Tokenizer(
        folder,
        limit=tables["position_embedding"]["embedding"].shape[0],
        vocabulary=tables["token_embedding"]["embedding"].shape[0],
    )
    return Clip(
        convert.read(model, origins, headers, jnp.float32),
        tokenizer,
        _preparation(folder, clip_model.image_size(config)),
        tuple(hub.model_weights(folder)),
        tuple(hub.model_settings(folder)),
    )


def _preparation(folder: pathlib.Path, side: int) -> dict:
    file = folder / "preprocessor_config.json"
    said = read_json(file) if file.is_file() else {"size": side, "crop_size": side}
    how = _PREPARATION | {name: value for name, value in said.items() if name in _PREPARATION}
    problems = kinds.problems(how, _KINDS)
    problems += [
        f"{name}={how[name]!r}" for name, keys in _SIDES.items() if not any(_whole(how[name], key) for key in keys)
    ]
    if problems:
        raise AegisError(f"{file}: {'; '.join(problems)}")
    probe = prepare(np.zeros((1, side, side, 3), np.uint8), how).shape
    if probe[1:3] != (side, side):
        raise AegisError(f"{file} makes pictures of {probe[2]}x{probe[1]} pixels and the image tower wants {side}")
    return how


# The forms that sizes may have: a number (of the shorter edge, or of a square to cut), or an object with these keys.
_SIDES = {"size": ((), ("shortest_edge",), ("height", "width")), "crop_size": ((), ("height", "width"))}


def _whole(value, keys: tuple[str, ...]) -> bool:
    if not keys:
        return kinds.SIZE.accepts(value)
    return isinstance(value, dict) and all(kinds.SIZE.accepts(value.get(key)) for key in keys)
