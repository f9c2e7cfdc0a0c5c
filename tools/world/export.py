"""Puts the trained parts together: a diffusers folder in fp16, with judges and CLIP beside the pipeline."""

import importlib.metadata
import json
import pathlib
import platform
import tempfile

import numpy as np
from safetensors.numpy import save_file

from aegis_jax.io.export import save_pipeline
from aegis_jax.io.pipeline import Pipeline
from aegis_jax.io.tokenizer import Tokenizer
from aegis_jax.models import clip as clip_model
from aegis_jax.models import unet as unet_model
from aegis_jax.models import vae as vae_model
from aegis_jax.models.model import abstract, flatten
from aegis_jax.world import captions, clip, tokenizer
from aegis_jax.world.towers import Committee, Headed
from tools.world import stages
from tools.world.architectures import JUDGES, SCHEDULER, UNET, VAE, VISION, text_config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
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


def export(parts: dict, record: dict, folder: pathlib.Path, *, seed: int, command: str) -> pathlib.Path:
    """Write `folder`, replacing an older export. parts: parameters by stage; record: its
    measurements.
    """
    scale = record["unet"]["scaling_factor"]
    text = {"text_model": parts["clip"]["text_model"]}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.write(pathlib.Path(scratch), captions.words())
        pipeline = Pipeline(
            unet=stages.as_model(unet_model.UNet2DConditionModel, UNET, parts["unet"]),
            vae=stages.as_model(vae_model.AutoencoderKL, VAE | {"scaling_factor": scale}, parts["vae"]),
            text_encoder=stages.as_model(clip_model.CLIPTextModel, text_config(), text),
            tokenizer=Tokenizer(scratch, limit=tokenizer.MAX_LENGTH),
            scheduler=SCHEDULER,
            source=None,
        )
        save_pipeline(pipeline, folder, dtype=np.float16, overwrite=True, card=CARD)
    for name, config in JUDGES.items():
        _save(config, stages.as_model(Committee, config, parts[name]).params, folder / name)
    save_clip(assemble(parts["clip"]), folder / "clip")
    about = {
        "command": command,
        "seed": seed,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "stages": record,
    }
    (folder / "world.json").write_text(json.dumps(about, indent=2) + "\n")
    return folder


def assemble(params: dict) -> clip.Clip:
    """The Clip of this world's configs with the given parameters."""
    towers = abstract(clip_model.CLIPTextModel, text_config()), abstract(Headed, VISION)
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
