"""A pipeline -> a complete diffusers folder, as close to its source as what was changed allows.

Files are copied, tensors whose values are still those of the source are copied as bytes, changed
tensors are written in their place under their source key. Nothing is visible under the
destination's name before all of it is there.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import convert, hub, parts, safetensors, tiles
from aegis_jax.io.folder import CONFIGS, NEED_WEIGHTS, File, Weights, read_json
from aegis_jax.io.pipeline import MODELS, Pipeline
from aegis_jax.models import layout
from aegis_jax.models.model import Model, flatten

_FLOAT32 = np.dtype(np.float32)
_COMPARED = 1 << 18  # bytes that are compared at a time
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
    drift: Mapping[str, jax.Array] | None = None,
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
    README.md. drift: {leaf path: array} to add to parameters of the UNet, in float32, as they are
    written. Beside the pipeline and the drift themselves only a few tensors are in memory at a time;
    a mapping that makes its arrays when asked saves the memory for all of them.

    Raises `AegisError` if the destination exists, the disk is full, a component has no weights that
    diffusers would look for, the source has changed since it was loaded, or a changed tensor holds
    values that are not finite in `dtype`; nothing is left behind then.
    """
    dtype = None if dtype is None else safetensors.dtype_name(dtype)
    check_complete(pipeline)
    destination = _checked_destination(folder, overwrite)
    _check_space(pipeline, destination)
    with _written_beside(destination) as unfinished:
        write = _write_new if pipeline.source is None else _write_alike
        changed = write(pipeline, unfinished, dtype, drift or {})
        if card is None:
            counts = ", ".join(f"{changed[name]} in {name}" for name in MODELS if changed[name])
            card = _CARD.format(name=destination.name, changed=counts or "none")
        _write_bytes(unfinished / "README.md", card.encode(errors="replace"))


def check_complete(pipeline: Pipeline) -> None:
    """Refuses what could be loaded here but not, after an export, by diffusers: a safety checker without weights.

    A hub repository comes so whose checker is a pickle, which is not downloaded.
    """
    folder = pipeline.source and pipeline.source.folder
    bare = [name for name in NEED_WEIGHTS if folder and name in folder.components]
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
    components = pipeline.source.folder.components.values()
    return sum(h.size for c in components if c.weights for h in c.weights.headers)


def _checked_destination(folder: str | os.PathLike, overwrite: bool) -> pathlib.Path:
    destination = hub.expand(folder).resolve()
    if not destination.exists():
        return destination
    if not overwrite:
        raise AegisError(f"{destination} exists: choose another folder or allow overwriting it")
    # An unlucky argument must not cost a home directory.
    if not destination.is_dir() or (any(destination.iterdir()) and not (destination / "model_index.json").is_file()):
        raise AegisError(f"{destination} is no pipeline folder, so it is not overwritten: choose another")
    return destination


def _check_space(pipeline: Pipeline, destination: pathlib.Path) -> None:
    """Refuses at once what cannot fit; the writer itself notices whatever this misses."""
    needed = written_bytes(pipeline)
    existing = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise AegisError(
            f"no space left for {destination}: about {needed / 1e9:.2f} GB are needed, "
            f"{free / 1e9:.2f} GB are free; free some space or choose another folder"
        )


@contextlib.contextmanager
def _written_beside(destination: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside the destination, renamed to it on success and removed otherwise."""
    unfinished = destination.with_name(f".{destination.name}.{os.getpid()}.unfinished")
    replaced = destination.with_name(f".{destination.name}.{os.getpid()}.replaced")
    with safetensors.writing(destination):
        try:
            # What a killed process left that had our number, as the first in a container always has, goes first.
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            yield unfinished
            if destination.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(destination, replaced)
            try:
                os.rename(unfinished, destination)
            except OSError:
                if replaced.exists():
                    os.rename(replaced, destination)
                raise
            _sync_folder(destination.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(path: pathlib.Path) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A parameter on its way out.

    drift: makes what is added to it, in float32; None: nothing. source: reads rows of its tensor in the source, which
    may have more bits than the array; None: the array itself is right.
    """

    path: str
    array: jax.Array
    drift: Callable[[], jax.Array] | None = None
    source: Callable[[slice], np.ndarray] | None = None

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype if self.drift is None else _FLOAT32

    def rows(self, rows, drift: np.ndarray | None) -> np.ndarray:
        """Rows in PyTorch's layout and in `dtype`; drift: all of what `drift` makes, which is the caller's to hold."""
        if self.source is None:
            tensor = _laid_out(self.path, self.array, rows, self.dtype)
        else:
            tensor = self.source(rows).astype(self.dtype)
        if drift is not None:
            tensor += _laid_out(self.path, drift, rows, self.dtype)
        return tensor


class _Drifts:
    """The drifts of those leaves that are being written: made at a leaf's first part, dropped after its last."""

    def __init__(self, leaves: dict[str, _Leaf]):
        self._leaves, self._held, self._lock = leaves, {}, threading.Lock()

    @contextlib.contextmanager
    def of(self, key: str, count: int) -> Iterator[np.ndarray | None]:
        """The drift of a leaf, for one of its `count` parts."""
        if self._leaves[key].drift is None:
            yield None
            return
        with self._lock:
            drift, left = self._held.get(key) or (np.asarray(self._leaves[key].drift()), count)
            self._held[key] = drift, left - 1
            if left == 1:
                del self._held[key]
        yield drift


def _write_alike(pipeline: Pipeline, root: pathlib.Path, dtype: str | None, drift: Mapping) -> dict[str, int]:
    """Writes a pipeline like its source; returns how many tensors of each model were changed."""
    source = pipeline.source
    changed = {}
    for file in source.folder.files:
        _copy(file, root)
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
                _copy(file, target)
        if name in MODELS:
            changed[name] = _write_model(
                getattr(pipeline, name), component.weights, source.origins[name], target, dtype,
                drift if name == "unet" else {},
            )  # fmt: skip
        elif component.weights:
            _write_model(None, component.weights, {}, target, None, {})
    return changed


def _write_model(
    model: Model | None,
    weights: Weights,
    origins: dict[str, convert.Origin],
    target: pathlib.Path,
    dtype: str | None,
    drift: Mapping,
) -> int:
    """Writes a component's weight files; returns how many tensors were changed.

    model: whose parameters are written; None copies the source's files.
    """
    leaves = _leaves(model, drift) if model else {}
    _check_leaves(leaves, origins, weights, target.name)
    changed, sizes = 0, []
    for index, (header, name) in enumerate(zip(weights.headers, weights.names, strict=True)):
        here = {origin.key: leaves[path] for path, origin in origins.items() if origin.file == index}
        count, entries = _write_file(header, here, target / name, dtype)
        changed += count
        sizes += [(entry.key, name, entry.nbytes) for entry in entries]
    if weights.index:
        _write_index(weights, target, sizes)
    return changed


def _leaves(model: Model, drift: Mapping) -> dict[str, _Leaf]:
    leaves = flatten(model.params)
    strange = sorted(set(drift) - leaves.keys())
    if strange:
        raise AegisError(f"the drift is of another UNet, which has {strange[0]}: take the pipeline it was trained on")
    make = {path: functools.partial(drift.__getitem__, path) for path in drift}
    return {path: _Leaf(path, array, make.get(path)) for path, array in leaves.items()}


def _check_leaves(leaves, origins, weights, component: str) -> None:
    """Refuses parameters that are not, by name and shape, those that were loaded."""
    wrong = sorted(leaves.keys() ^ origins.keys())
    for path in leaves.keys() & origins.keys():
        entry = weights.headers[origins[path].file].entries[origins[path].key]
        shape = layout.torch_shape(path, leaves[path].array.shape)
        if entry.shape not in {shape, (*shape, 1, 1)}:
            wrong.append(path)
    if wrong:
        raise AegisError(
            f"{component}: {len(wrong)} parameters are not those of the source, first {wrong[0]}: "
            "export the pipeline with source=None to write it whole"
        )


def _write_file(
    header: safetensors.Header, here: dict[str, _Leaf], path: pathlib.Path, dtype: str | None
) -> tuple[int, list[safetensors.Entry]]:
    """Writes one weight file like `header`; `here` = {key: leaf} of its parameters."""
    with safetensors.open_unchanged(header) as file:
        here = dict(zip(here, parts.on_all_cores(lambda key: _in_full(file, header, key, here[key]), here)))
        # The header comes first and has to know which tensors change type.
        same = parts.on_all_cores(lambda key: _is_same(file, header, key, here[key]), here)
        changed = {key for key, unchanged in zip(here, same) if not unchanged}
        entries = [
            dataclasses.replace(entry, dtype=dtype) if dtype and entry.key in changed else entry
            for entry in header.entries.values()
        ]
        part = _part_of(here, entries)
        as_before = entries == list(header.entries.values())
        safetensors.write(
            path,
            entries,
            lambda key, rows: (
                part(key, rows) if key in changed else safetensors.read_tensor(file, header, key, rows=rows)
            ),
            metadata=header.metadata,
            raw_header=header.raw if as_before else None,
        )
    return len(changed), entries


def _part_of(leaves: dict[str, _Leaf], entries: list[safetensors.Entry]) -> Callable:
    """What gives `safetensors.write` the parts of leaves, as `entries` say."""
    entries, drifts = {entry.key: entry for entry in entries}, _Drifts(leaves)

    def part(key, rows):
        entry = entries[key]
        with drifts.of(key, len(parts.split(entry.shape, entry.numpy_dtype.itemsize))) as drift:
            tensor = leaves[key].rows(rows, drift)
        return _cast(tensor, entry.numpy_dtype, key).reshape(-1, *entry.shape[1:]) if entry.shape else tensor

    return part


def _in_full(file, header: safetensors.Header, key: str, leaf: _Leaf) -> _Leaf:
    """The leaf, to be read from its source if that has bits that were lost when it was loaded.

    Their rounding would go into the export with the drift. An array that was changed since it was loaded stays.
    """
    if leaf.drift is None or leaf.dtype == leaf.array.dtype:
        return leaf
    if not _is_same(file, header, key, dataclasses.replace(leaf, drift=None)):
        return leaf
    return dataclasses.replace(leaf, source=lambda rows: safetensors.read_tensor(file, header, key, rows=rows))


def _is_same(file, header: safetensors.Header, key: str, leaf: _Leaf) -> bool:
    """Whether a leaf has the bits that loading its source tensor in the leaf's dtype gives."""
    entry, bits = header.entries[key], f"u{leaf.dtype.itemsize}"
    drift = None if leaf.drift is None else np.asarray(leaf.drift())
    # Part by part: of a tensor that was trained the first part differs, and the rest need not be looked at.
    for rows in parts.split(entry.shape, entry.numpy_dtype.itemsize, _COMPARED):
        source = safetensors.read_tensor(file, header, key, rows=rows)
        with np.errstate(over="ignore"):
            source = source.astype(leaf.dtype, copy=False)
        ours = leaf.rows(rows, drift)
        if not np.array_equal(source.view(bits).reshape(-1), ours.view(bits).reshape(-1)):
            return False
    return True


def _laid_out(path: str, leaf, rows, dtype) -> np.ndarray:
    """Rows of a leaf in PyTorch's layout."""
    part = layout.to_torch(path, np.asarray(leaf))[rows]
    tensor = np.empty(part.shape, dtype)
    with np.errstate(over="ignore"):
        tiles.copy(tensor, part)
    return tensor


def _cast(tensor: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype, copy=False)
    if not np.isfinite(result).all():
        advice = (
            f"they are too large for {dtype}: choose dtype float32 or bfloat16"
            if np.isfinite(tensor).all()
            else "training has diverged: go back to an earlier checkpoint"
        )
        raise AegisError(f"tensor {key!r} has values that are not finite in the export; {advice}")
    return result


def _write_index(weights: Weights, target: pathlib.Path, sizes: list[tuple]) -> None:
    """The index of shards: the source's own bytes unless a size or a file name has changed."""
    files = zip(weights.headers, weights.names, strict=True)
    names = {header.path.name: name for header, name in files}
    before = sum(entry.nbytes for header in weights.headers for entry in header.entries.values())
    total = sum(size for _, _, size in sizes)
    if total == before and all(old == new for old, new in names.items()):
        _copy(weights.index, target)
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
        leaves = _leaves(model, drift if name == "unet" else {})
        counts[name] = _write_whole(leaves, root / name / f"{stem}.safetensors", dtype or "F32")
    return counts


def _write_whole(leaves: dict[str, _Leaf], path: pathlib.Path, dtype: str) -> int:
    leaves = {layout.torch_key(name): leaf for name, leaf in leaves.items()}
    entries = [
        safetensors.Entry(key, dtype, layout.torch_shape(leaf.path, leaf.array.shape))
        for key, leaf in sorted(leaves.items())
    ]
    # transformers refuses files that do not say which framework's layout they have.
    safetensors.write(path, entries, _part_of(leaves, entries), metadata={"format": "pt"})
    return len(entries)


def _copy_tokenizer(pipeline: Pipeline, target: pathlib.Path) -> None:
    for file in sorted(pipeline.tokenizer.folder.iterdir()):
        if file.suffix in {".json", ".txt"} and file.is_file():
            _write_bytes(target / file.name, file.read_bytes())


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


def _copy(file: File, target: pathlib.Path) -> None:
    _write_bytes(target / file.name, _unchanged(file).path.read_bytes())


def _write_json(path: pathlib.Path, value: dict) -> None:
    _write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def _write_bytes(path: pathlib.Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
