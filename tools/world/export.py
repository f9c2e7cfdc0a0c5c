"""Puts the trained parts together: a diffusers folder in fp16, with judges and CLIP beside the pipeline."""

import importlib.metadata
import json
import pathlib
import platform
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

from aegis_jax.errors import AegisError
from aegis_jax.io.export import save_pipeline
from aegis_jax.io.pipeline import Pipeline, load_pipeline
from aegis_jax.io.tokenizer import Tokenizer
from aegis_jax.models import clip as clip_model
from aegis_jax.models import unet as unet_model
from aegis_jax.models import vae as vae_model
from aegis_jax.models.model import abstract, flatten, unflatten
from aegis_jax.world import clip, tokenizer
from aegis_jax.world.towers import Committee, Headed
from tools.world import stages
from tools.world.subject import WORLD, Subject

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def export(
    parts: dict, record: dict, folder: pathlib.Path, *, seed: int, command: str, subject: Subject = WORLD
) -> pathlib.Path:
    """Write `folder`, replacing an older export. parts: parameters by stage; record: its
    measurements.
    """
    build = subject.architectures
    scale = record["unet"]["scaling_factor"]
    text = {"text_model": parts["clip"]["text_model"]}
    with tempfile.TemporaryDirectory() as scratch:
        subject.write_tokenizer(pathlib.Path(scratch))
        pipeline = Pipeline(
            unet=stages.as_model(unet_model.UNet2DConditionModel, build.UNET, parts["unet"]),
            vae=stages.as_model(vae_model.AutoencoderKL, build.VAE | {"scaling_factor": scale}, parts["vae"]),
            text_encoder=stages.as_model(clip_model.CLIPTextModel, build.text_config(), text),
            tokenizer=Tokenizer(scratch, limit=tokenizer.MAX_LENGTH),
            scheduler=build.SCHEDULER,
            source=None,
        )
        save_pipeline(pipeline, folder, dtype=np.float16, overwrite=True, card=subject.card)
    for name, config in build.JUDGES.items():
        _save(config, stages.as_model(Committee, config, parts[name]).params, folder / name)
    save_clip(assemble(parts["clip"], subject), folder / "clip")
    about = {
        "command": command,
        "seed": seed,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "stages": record,
    }
    for name, text in subject.files.items():
        (folder / name).write_text(text)
    (folder / f"{subject.name}.json").write_text(json.dumps(about, indent=2) + "\n")
    return folder


def parts_of(folder: pathlib.Path, subject: Subject) -> tuple[dict, dict]:
    """(parts, record) as `export` was given them, in fp16's precision: what to go on from. Raises as `record_of`."""
    record = record_of(folder, subject.name)
    pipeline = load_pipeline(folder)
    read = lambda name: unflatten(load_file(folder / name / "model.safetensors"))  # noqa: E731
    parts = {"clip": pipeline.text_encoder.params | read("clip"), "vae": pipeline.vae.params}
    parts |= {"unet": pipeline.unet.params} | {name: read(name) for name in subject.architectures.JUDGES}
    return parts, record


def record_of(folder: pathlib.Path, name: str) -> dict:
    """The record that `export` was given. Raises `AegisError` for a folder that is no world of that name it wrote."""
    about = folder / f"{name}.json"
    if not about.is_file():
        raise AegisError(f"{folder} is no exported {name}: it has no {about.name}")
    return json.loads(about.read_text())["stages"]


def assemble(params: dict, subject: Subject = WORLD) -> clip.Clip:
    """The Clip of the subject's configs with the given parameters."""
    build = subject.architectures
    towers = abstract(clip_model.CLIPTextModel, build.text_config()), abstract(Headed, build.VISION)
    return clip.Clip(*towers, params)


def save_clip(model: clip.Clip, folder: pathlib.Path) -> None:
    """All but the text tower, which is the pipeline's text encoder."""
    own = {name: tree for name, tree in model.params.items() if name not in model.text.params}
    _save({"vision_config": model.vision.config}, own, folder)


def _save(config: dict, params: dict, folder: pathlib.Path) -> None:
    """config.json and model.safetensors (fp16, our own layout and names)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({k: np.asarray(v, np.float16) for k, v in flatten(params).items()}, folder / "model.safetensors")
