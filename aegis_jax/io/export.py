"""A pipeline -> a complete diffusers folder, as close to its source as what was changed allows.

Files are copied, tensors whose values are still those of the source are copied as bytes, changed
tensors are written in their place under their source key. Nothing is visible under the
destination's name before all of it is there.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Mapping

import jax

from aegis_jax.errors import AegisError
from aegis_jax.io import convert, hub, safetensors, tensors
from aegis_jax.io.folder import CONFIGS, NEED_WEIGHTS, File, Weights, read_json
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

    Raises `AegisError` if the destination exists, the disk is full, a component has no weights that
    diffusers would look for, the source has changed since it was loaded, or a changed tensor holds
    values that are not finite in `dtype`, and `Stopped` on SIGTERM; nothing is left behind then.
    """
    dtype = None if dtype is None else safetensors.dtype_name(dtype)
    check_complete(pipeline)
    destination = _checked_destination(folder, overwrite)
    remove_leftovers(destination)
    _check_space(pipeline, destination)
    with _written_beside(destination) as unfinished:
        write = _write_new if pipeline.source is None else _write_alike
        changed = write(pipeline, unfinished, dtype, drift or {})
        if card is None:
            counts = ", ".join(f"{changed[name]} in {name}" for name in MODELS if changed[name])
            card = _CARD.format(name=destination.name, changed=counts or "none")
        _write_bytes(unfinished / "README.md", card.encode(errors="replace"))


def check_complete(pipeline: Pipeline) -> None:
    """Refuses what could be loaded here but not, after an export, by diffusers: a safety checker that is not whole.

    A hub repository comes so whose checker is a pickle, which is not downloaded.
    """
    folder = pipeline.source and pipeline.source.folder
    if folder and "safety_checker" in folder.components and "feature_extractor" in folder.absent:
        raise AegisError(
            f"{folder.path} has a safety_checker but no feature_extractor, so that diffusers could not load an "
            'export: add it, or let model_index.json say "safety_checker": [null, null]'
        )
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


class Stopped(KeyboardInterrupt):
    """SIGTERM arrived while a pipeline was written: nothing was kept of it, or if it stood in its place all of it."""

    def __init__(self, signum: int, destination: pathlib.Path, is_whole: bool):
        kept = "it is whole and in its place" if is_whole else "nothing was kept of it"
        super().__init__(f"{signal.Signals(signum).name} while writing {destination}: {kept}")
        self.signum = signum


@contextlib.contextmanager
def _stopped_by_sigterm(destination: pathlib.Path) -> Iterator[None]:
    """SIGTERM, which would end the process on the spot, raises `Stopped`; a handler of the user's own stays.

    Outside the main thread Python allows no signal handlers.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    before = _identity(destination)

    def stop(signum, frame):
        signal.signal(signum, signal.SIG_IGN)  # a second one must not interrupt the removal
        raise Stopped(signum, destination, _identity(destination) not in (None, before))

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    """What a folder keeps when it is renamed; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def _beside(destination: pathlib.Path, what: str) -> pathlib.Path:
    """The hidden folder that this process uses while it writes `destination`; what: unfinished or replaced."""
    return destination.with_name(f".{destination.name}.{socket.gethostname()}-{os.getpid()}.{what}")


def remove_leftovers(folder: str | os.PathLike, kinds: tuple[str, ...] = ("unfinished",)) -> None:
    """Removes what killed exports to `folder` have left beside it.

    Only folders with a name of ours whose process was on this host and is no more. kinds: "unfinished" and "replaced",
    the latter being the pipeline that stood at `folder` before, and perhaps the only one.
    """
    destination = hub.expand(folder).resolve()
    name = re.compile(rf"\.{re.escape(destination.name)}\.(.+)-(\d+)\.({'|'.join(kinds)})")
    if not destination.parent.is_dir():
        return
    for path in destination.parent.iterdir():
        found = name.fullmatch(path.name)
        if found and found[1] == socket.gethostname() and not _is_other_process(int(found[2])):
            shutil.rmtree(path, ignore_errors=True)


def _is_other_process(pid: int) -> bool:
    """Whether a process of this number runs that is not this one.

    This one has the number of a killed one where it is the first in a container.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


@contextlib.contextmanager
def _written_beside(destination: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside the destination, renamed to it on success and removed otherwise."""
    unfinished, replaced = _beside(destination, "unfinished"), _beside(destination, "replaced")
    with safetensors.writing(destination), _stopped_by_sigterm(destination):
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            try:
                if destination.exists():
                    shutil.rmtree(replaced, ignore_errors=True)
                    os.rename(destination, replaced)
                os.rename(unfinished, destination)
            except BaseException:
                if replaced.exists() and not destination.exists():
                    os.rename(replaced, destination)
                raise
            _sync_folder(destination.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        remove_leftovers(destination, ("unfinished", "replaced"))


def _sync_folder(path: pathlib.Path) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_alike(pipeline: Pipeline, root: pathlib.Path, dtype: str | None, drift: Mapping) -> dict[str, int]:
    """Writes a pipeline like its source; returns how many tensors of each model were changed."""
    source = pipeline.source
    changed = {}
    for file in source.folder.files:
        if file.name == "model_index.json" and source.folder.absent:
            # As PyTorch writes a pipeline that was loaded without them.
            nulls = {name: [None, None] for name in source.folder.absent}
            _write_json(root / file.name, read_json(_unchanged(file).path) | nulls)
        else:
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
                drift.get(name, {}),
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
    leaves = tensors.leaves_of(model, drift) if model else {}
    tensors.check(leaves, origins, weights, target.name)
    changed, sizes = 0, []
    for index, (header, name) in enumerate(zip(weights.headers, weights.names, strict=True)):
        here = {origin.key: leaves[path] for path, origin in origins.items() if origin.file == index}
        count, entries = tensors.write_like(header, here, target / name, dtype)
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
        leaves = tensors.leaves_of(model, drift.get(name, {}))
        counts[name] = tensors.write_whole(leaves, root / name / f"{stem}.safetensors", dtype or "F32")
    return counts


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
