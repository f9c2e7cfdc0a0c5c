"""A pipeline -> a complete diffusers folder, as close to its source as what was changed allows.

Files are copied, tensors whose values are still those of the source are copied as bytes, changed
tensors are written in their place under their source key. Nothing is visible under the
destination's name before all of it is there.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping

import jax

from aegis_jax.diffusion.conditioning import check_loaded
from aegis_jax.errors import AegisError
from aegis_jax.io import convert, safetensors, tensors
from aegis_jax.io.destination import new_folder
from aegis_jax.io.folder import CONFIGS, NEED_WEIGHTS, File, Folder, Weights, read_json
from aegis_jax.io.pipeline import MODELS, Pipeline
from aegis_jax.models.model import Model, flatten

_CARD = """---
library_name: diffusers
tags:
- stable-diffusion
- aegis_jax
---

# {name}

A Stable Diffusion pipeline in diffusers format, exported by aegis_jax.

Tensors that differ from the pipeline it came from: {changed}.
"""


def save_pipeline(
    pipeline: Pipeline,
    folder: str | os.PathLike,
    *,
    dtype=None,
    overwrite: bool = False,
    card: str | None = None,
    drift: Mapping[str, Mapping[str, jax.Array]] | None = None,
) -> None:
    """Writes a diffusers folder that PyTorch diffusers loads.

    Configs, tokenizer, safety checker and feature extractor are copied from the source byte for
    byte; so are tensors whose parameters are bit-equal to the source's (in the parameters' dtype).
    Key order, metadata and the division into shards stay; a variant's mark in file names
    ("model.fp16.safetensors") is dropped, because the result is the only one in its folder.
    Pickles, other variants, pictures and the source's README are left out.

    dtype: of changed tensors (float32, float16, bfloat16); default: that of the source tensor. A
    pipeline without a source is written whole, by default in float32. overwrite: replace an
    existing pipeline folder, which is removed only after success. card: text of the model card,
    README.md. drift: {component: {leaf path: array}} to add to parameters, in float32, as they are
    written. Beside the pipeline and the drift themselves only a few tensors are in memory at a time;
    a mapping that makes its arrays when asked saves the memory for all of them.

    Raises `AegisError` for what is no pipeline, if the destination exists or holds the folder that the pipeline
    was loaded from, the disk is full, a component has no weights that diffusers would look for, the source has
    changed since it was loaded, the drift is of other tensors, or a changed tensor holds values that are not
    finite in `dtype`, and `Stopped` on SIGTERM; nothing is left behind then.
    """
    check_loaded(pipeline)
    dtype = None if dtype is None else safetensors.dtype_name(dtype)
    check_complete(pipeline)
    strange = sorted(set(drift or ()) - MODELS.keys())
    if strange:
        raise AegisError(f"the drift names the component {strange[0]!r}: wanted {', '.join(MODELS)}")
    source, needed = pipeline.source and pipeline.source.folder.path, written_bytes(pipeline)
    with new_folder(folder, overwrite=overwrite, needed=needed, source=source) as (unfinished, destination):
        write = _write_new if pipeline.source is None else _write_alike
        changed = write(pipeline, unfinished, dtype, drift or {})
        if card is None:
            counts = ", ".join(f"{changed[name]} in {name}" for name in MODELS if changed[name])
            card = _CARD.format(name=destination.name, changed=counts or "none")
        write_bytes(unfinished / "README.md", card.encode(errors="replace"))


def check_complete(pipeline: Pipeline) -> None:
    """Refuses what could be loaded here but not, after an export, by diffusers: see `check_whole`."""
    if pipeline.source:
        check_whole(pipeline.source.folder)


def check_whole(folder: Folder) -> None:
    """Refuses a folder of which diffusers could not load a copy: with a safety checker that is not whole.

    A hub repository comes so whose checker is a pickle, which is not downloaded.
    """
    if "safety_checker" in folder.components and "feature_extractor" in folder.absent:
        raise AegisError(
            f"{folder.path} has a safety_checker but no feature_extractor, so that diffusers could not load an "
            'export: add it, or let model_index.json say "safety_checker": [null, null]'
        )
    bare = [name for name in NEED_WEIGHTS if name in folder.components]
    bare = [name for name in bare if folder.components[name].weights is None]
    if bare:
        raise AegisError(
            f"{folder.path / bare[0]} has no safetensors, so that diffusers could not load an export: add them, or let "
            f'model_index.json say "{bare[0]}": [null, null]'
        )


def written_bytes(pipeline: Pipeline) -> int:
    """About how many bytes `save_pipeline` writes."""
    if pipeline.source is None:
        models = [getattr(pipeline, name).params for name in MODELS]
        return sum(leaf.nbytes for params in models for leaf in flatten(params).values())
    return weight_bytes(pipeline.source.folder)


def weight_bytes(folder: Folder) -> int:
    """How many bytes the weight files of a folder have."""
    return sum(h.size for c in folder.components.values() if c.weights for h in c.weights.headers)


def _write_alike(pipeline: Pipeline, root: pathlib.Path, dtype: str | None, drift: Mapping) -> dict[str, int]:
    """Writes a pipeline like its source; returns how many tensors of each model were changed."""
    source = pipeline.source
    changed = {}
    copy_root(source.folder, root)
    for name, component in source.folder.components.items():
        target = root / name
        target.mkdir()
        config = component.config
        if name in MODELS:
            config = getattr(pipeline, name).config
        elif name == "scheduler":
            config = pipeline.scheduler
        if name == "tokenizer" and pipeline.tokenizer.folder != source.folder.path / "tokenizer":
            _copy_tokenizer(pipeline, target)
            continue
        for file in component.files:
            if file.name == CONFIGS.get(name) and config != component.config:
                _write_json(target / file.name, config)
            else:
                copy_file(file, target)
        if name in MODELS:
            changed[name] = _write_model(
                getattr(pipeline, name), component.weights, source.origins[name], target, dtype,
                drift.get(name, {}),
            )  # fmt: skip
        elif component.weights:
            write_weights(component.weights, target, functools.partial(_write_copy, component.weights))
    return changed


def copy_root(source: Folder, root: pathlib.Path) -> None:
    """Copies the files that lie beside the components' folders: model_index.json and the licence."""
    for file in source.files:
        if file.name == "model_index.json" and source.absent:
            # As PyTorch writes a pipeline that was loaded without them.
            nulls = {name: [None, None] for name in source.absent}
            _write_json(root / file.name, read_json(_unchanged(file).path) | nulls)
        else:
            copy_file(file, root)


def _write_model(
    model: Model,
    weights: Weights,
    origins: dict[str, convert.Origin],
    target: pathlib.Path,
    dtype: str | None,
    drift: Mapping,
) -> int:
    """Writes a model's weight files; returns how many tensors were changed."""
    leaves = tensors.leaves_of(model, drift)
    tensors.check(leaves, origins, weights, target.name)

    def write(index, file):
        here = {origin.key: leaves[path] for path, origin in origins.items() if origin.file == index}
        return tensors.write_like(weights.headers[index], here, file, dtype)

    return write_weights(weights, target, write)


def _write_copy(weights: Weights, index: int, path: pathlib.Path) -> tuple[int, list[safetensors.Entry]]:
    return tensors.write_like(weights.headers[index], {}, path, None)


def write_weights(weights: Weights, target: pathlib.Path, write: Callable) -> int:
    """Writes a component's weight files and their index; returns how many tensors were changed.

    write(index, path): writes what stands for the file of that number, and gives the number of changed tensors and
    the entries.
    """
    changed, sizes = 0, []
    for index, name in enumerate(weights.names):
        count, entries = write(index, target / name)
        changed += count
        sizes += [(entry.key, name, entry.nbytes) for entry in entries]
    if weights.index:
        _write_index(weights, target, sizes)
    return changed


def _write_index(weights: Weights, target: pathlib.Path, sizes: list[tuple]) -> None:
    """The index of shards: the source's own bytes unless a size or a file name has changed."""
    files = zip(weights.headers, weights.names, strict=True)
    names = {header.path.name: name for header, name in files}
    before = sum(entry.nbytes for header in weights.headers for entry in header.entries.values())
    total = sum(size for _, _, size in sizes)
    if total == before and all(old == new for old, new in names.items()):
        copy_file(weights.index, target)
        return
    index = read_json(_unchanged(weights.index).path)
    index["weight_map"] = {key: names[name] for key, name in index["weight_map"].items()}
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        index["metadata"]["total_size"] = total
    _write_json(target / weights.index.name, index)


def _write_new(pipeline: Pipeline, root: pathlib.Path, dtype: str | None, drift: Mapping) -> dict[str, int]:
    """Writes a pipeline that was built in memory; returns how many tensors each model has."""
    scheduler_class = pipeline.scheduler.get("_class_name", "DDIMScheduler")
    version = pipeline.unet.config.get("_diffusers_version", "0.40.0")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": version,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(root / "model_index.json", index)
    for name in ("scheduler", "tokenizer", *MODELS):
        (root / name).mkdir()
    _write_json(root / "scheduler" / CONFIGS["scheduler"], pipeline.scheduler)
    _copy_tokenizer(pipeline, root / "tokenizer")
    counts = {}
    for name in MODELS:
        model = getattr(pipeline, name)
        _write_json(root / name / CONFIGS[name], model.config)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        leaves = tensors.leaves_of(model, drift.get(name, {}))
        counts[name] = tensors.write_whole(leaves, root / name / f"{stem}.safetensors", dtype or "F32")
    return counts


def _copy_tokenizer(pipeline: Pipeline, target: pathlib.Path) -> None:
    for file in sorted(pipeline.tokenizer.folder.iterdir()):
        if file.suffix in {".json", ".txt"} and file.is_file():
            write_bytes(target / file.name, file.read_bytes())


def _unchanged(file: File) -> File:
    try:
        status = file.path.stat()
    except OSError:
        status = None
    if status is None or (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise AegisError(
            f"{file.path} has {'changed' if status else 'vanished'} since it was loaded: "
            "load the pipeline again before exporting it"
        )
    return file


def copy_file(file: File, target: pathlib.Path) -> None:
    """Copies a file into a folder, as it was when it was found."""
    write_bytes(target / file.name, _unchanged(file).path.read_bytes())


def _write_json(path: pathlib.Path, value: dict) -> None:
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
