"""What an attack found, as files from which PyTorch diffusers makes the same pictures (docs/attacks.md shows how).

prompts.csv           a row a picture: its prompt, the embedding file that goes with it, seed, outcome
*.safetensors         soft tokens as a textual inversion named <aegis>, one file a restart
prompt_embeds.safetensors   of an attack that feeds encodings: each picture's, (1, L, D), in place of its prompt
pipeline/             of an attack by weights: the model that draws the pictures
known.safetensors     of inpainting: each picture's mask, latents and noise, NAME.mask, NAME.z_0, NAME.noise
latents.safetensors   the start noise of every picture under the picture's name, (1, C, h, w)
attack.json           method, settings, guidance and steps, cost, outcomes with their intervals, versions
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from aegis_jax import __version__
from aegis_jax.attacks.result import PLACEHOLDER, AttackResult
from aegis_jax.io.export import save_pipeline
from aegis_jax.run.folder import write_json, write_text
from aegis_jax.run.prompts import csv_text

COLUMNS = ("file", "prompt", "seed", "embedding", "restart", "outcome", "same_tokens", "guidance", "steps", "first")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture that a row of a result makes.

    Attributes:
      name: of its file, without .png.
      row: of the result.
      start: its start noise (h, w, C).
      seed: from which `aegis sample` draws that noise; None if it does not.
      restart: which of the restarts on its prompt or picture.
    """

    name: str
    row: int
    start: np.ndarray
    seed: int | None = None
    restart: int = 0


def write(out: Path, result: AttackResult, pictures: list[Picture], images, about: dict) -> None:
    """Writes all of it into the folder `out`; images: uint8 (n, H, W, 3) of the pictures.

    about: what attack.json says beside cost; its "guidance" and "steps" are those of the pictures.
    """
    rows = [_row(result, picture, about) for picture in pictures]
    for picture, image in zip(pictures, images, strict=True):
        Image.fromarray(image).save(out / f"{picture.name}.png")
    write_text(out / "prompts.csv", csv_text([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]))
    save_file({p.name: _channels_first(p.start) for p in pictures}, out / "latents.safetensors")
    if result.known is not None:
        parts = {name: getattr(result.known, name) for name in ("mask", "z_0", "noise")}
        known = {f"{p.name}.{name}": _channels_first(x[p.row]) for p in pictures for name, x in parts.items()}
        save_file(known, out / "known.safetensors")
    if result.shifted:
        encoded = np.asarray(result.conditioning.embedding, np.float32)
        save_file({p.name: encoded[p.row][None].copy() for p in pictures}, out / "prompt_embeds.safetensors")
    for row, tokens in enumerate([] if result.soft_tokens is None else result.soft_tokens):
        save_file({PLACEHOLDER: np.ascontiguousarray(tokens, np.float32)}, out / _embedding(row))
    if result.pipeline is not None:
        save_pipeline(result.pipeline, out / "pipeline")
    cost = {"unet_evaluations": round(result.unet_evaluations), "seconds": round(result.seconds, 1)}
    if result.generated:
        cost["generated"] = result.generated
    write_json(out / "attack.json", about | cost | {"aegis_jax": __version__})


def _channels_first(x) -> np.ndarray:
    """(h, w, C) as PyTorch has a batch of one."""
    return np.ascontiguousarray(np.asarray(x, np.float32).transpose(2, 0, 1)[None])


def _embedding(row: int) -> str:
    return f"restart-{row}.safetensors"


def _row(result: AttackResult, picture: Picture, about: dict) -> dict:
    row = picture.row
    return {
        "file": f"{picture.name}.png",
        "prompt": result.prompts[row],
        "seed": "" if picture.seed is None else picture.seed,
        "embedding": "" if result.soft_tokens is None else _embedding(row),
        "restart": picture.restart,
        "outcome": "" if result.outcomes is None else result.outcomes[row],
        "same_tokens": "" if result.same_tokens is None else ("no", "yes")[int(result.same_tokens[row])],
        "guidance": about["guidance"],
        "steps": about["steps"],
        "first": "" if result.first is None else int(result.first[row]),
    }
