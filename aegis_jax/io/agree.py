"""Whether two diffusers folders are the same model but for values of the UNet's tensors.

The folders may have been written by different tools: configs with and without default values, tensors under old and
new names and in other shards are the same.
"""

import json
import pathlib
from collections.abc import Mapping

from aegis_jax.diffusion.schedule import ddim_config
from aegis_jax.errors import AegisError
from aegis_jax.io.folder import Folder, read_json
from aegis_jax.models import unet_config

# What diffusers and transformers take where a config does not say it, of what changes images and not shapes.
_DEFAULTS = {"vae": {"scaling_factor": 0.18215}, "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}}


def check_configs(result: Folder, original: Folder) -> None:
    """Refuses configs and vocabularies that differ in what they say: a delta carries tensors of two models only."""
    for name, component in result.components.items():
        ours, theirs = component.config, getattr(original.components.get(name), "config", None)
        if not ours or not theirs:
            continue
        if name == "scheduler":  # of any sampler, since samplers are the users' choice; the noise must be the same
            ours, theirs = ddim_config(ours), ddim_config(theirs)
        elif name == "unet":
            ours, theirs = (
                unet_config.check(config) | {"sample_size": unet_config.native_size(config)}
                for config in (ours, theirs)
            )
        else:
            ours, theirs = (_DEFAULTS.get(name, {}) | config for config in (ours, theirs))
        key = next((key for key in sorted(ours.keys() & theirs.keys()) if _differ(key, ours[key], theirs[key])), None)
        if key:
            _refuse(f"{name}: {key} is {json.dumps(ours[key])[:80]}", result, json.dumps(theirs[key])[:80], original)
    for file in ("vocab.json", "tokenizer.json", "merges.txt"):
        here, there = result.path / "tokenizer" / file, original.path / "tokenizer" / file
        if here.is_file() and there.is_file() and _read(here) != _read(there):
            _refuse(f"tokenizer/{file} is one", result, "another", original)


def _differ(key: str, ours, theirs) -> bool:
    # "_name_or_path" and the like, and what transformers notes of how it was saved.
    noted = {"torch_dtype", "dtype", "transformers_version", "architectures"}
    return ours != theirs and not key.startswith("_") and key not in noted


def _read(file: pathlib.Path):
    if file.suffix != ".json":
        return file.read_bytes().splitlines()
    # How a tokenizer.json cuts and pads is of its last call, which transformers saves with it; each call says it anew.
    said = {"truncation", "padding"} if file.name == "tokenizer.json" else set()
    return {key: value for key, value in read_json(file).items() if key not in said}


def _refuse(what: str, result: Folder, other: str, original: Folder) -> None:
    raise AegisError(
        f"{what} in {result.path} and {other} in {original.path}: a delta carries tensors of UNet and text "
        "encoder only, so keep the whole folder or give the base model that it was made of"
    )


def check_entries(name: str, ours: Mapping, theirs: Mapping, here: pathlib.Path, there: pathlib.Path) -> None:
    """Refuses tensors that are not, by key, dtype and shape, those of the base; values: Tensor, or None where absent.

    here, there: the paths that a message names.
    """
    strange = sorted(ours.keys() ^ {key for key, tensor in theirs.items() if tensor is not None})
    if strange:
        which, other = (here, there) if strange[0] in ours else (there, here)
        raise AegisError(
            f"{name}: {strange[0]!r} is in {which} but not in {other} ({len(strange)} such tensors): they are not of "
            "the same model; give the base model that it was made of"
        )
    for key, tensor in ours.items():
        our, their = tensor.entry, theirs[key].entry
        if our.dtype != their.dtype:
            raise AegisError(
                f"{name}: {key!r} is {our.dtype} in {here} and {their.dtype} in {there}: give the base in the same "
                "precision, e.g. by --variant fp16"
            )
        if our.shape != their.shape and not (name == "vae" and _squeezed(our.shape) == _squeezed(their.shape)):
            raise AegisError(
                f"{name}: {key!r} has shape {our.shape} in {here} and {their.shape} in {there}: they are not of the "
                "same model; give the base model that it was made of"
            )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones of a 1x1 convolution, which old VAE files have in the place of matrices."""
    return shape[:-2] if len(shape) == 4 and shape[-2:] == (1, 1) else shape
