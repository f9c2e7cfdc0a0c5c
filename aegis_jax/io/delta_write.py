"""Delta files (delta.py) written: of two pipelines' folders, or of a pipeline as loaded and a drift."""

import contextlib
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import agree, convert, delta, folder, hub, parts, pipeline, safetensors, tensors
from aegis_jax.io.destination import checked_file, new_file


def write_delta(
    erased, base, path: str | os.PathLike, *, revision: str | None = None, variant: str | None = None,
    about: Mapping[str, str] | None = None, overwrite: bool = False,
) -> int:  # fmt: skip
    """Writes the delta file that makes the pipeline `erased` of `base`; returns how many tensors it holds.

    erased: a diffusers folder whose UNet or text encoder was changed, by aegis_jax or another tool. base: the model
    that it was made of, as for `load_pipeline`; revision and variant are the base's, and `erased` may be of that
    variant, of none, or of the only one that it has. about: more metadata, e.g. the concepts. Only safetensors are
    read, part by part.

    Raises `AegisError` if anything but values of these two differs, if nothing does, if a changed value is not finite,
    or if `path` exists (with `overwrite`: is no delta file) or has a pickle's suffix.
    """
    path = check_path(path, overwrite)
    original = folder.examine(hub.locate(base, revision=revision, variant=variant), variant)
    result = _examined(erased, variant)
    _check_others(result, original)
    with delta.opened_both(original) as before, delta.opened_both(result) as after:
        for name in delta.CARRIED:
            agree.check_entries(name, after[name], before[name], result.path, original.path)
        new = {
            name: {key: tensor for key, tensor in after[name].items() if not delta.is_equal(before[name][key], tensor)}
            for name in delta.CARRIED
        }
        if not any(new.values()):
            raise AegisError(f"the UNet of {result.path} is that of {original.path}: there is nothing to write")
        delta.check_finite(new, result.path)
        metadata = _metadata(before, new, delta.base_hashes(original), about, _name(base))
        card = result.path / "README.md"
        if card.is_file():
            metadata["card"] = card.read_bytes().decode(errors="replace")
        path = check_path(path, overwrite)  # again: it took a while to read both models
        return _write(path, new, metadata)


def _metadata(before: dict, new: dict, hashes: Mapping[str, str], about: Mapping[str, str] | None, base: str) -> dict:
    """What a delta file says of its tensors; before, new: {component: {name: tensor}}."""
    replaced = {key: before[name][key] for name in delta.CARRIED for key in new[name]}
    version = delta.WITH_TEXT if new["text_encoder"] else delta.VERSION
    metadata = dict(about or {}) | {"format": "pt", "aegis_delta": version}
    metadata |= {
        "base": base,
        "base_sha256": delta.digest(replaced),
        **hashes,
        "result_sha256": delta.digest(before["unet"] | new["unet"]),
    }
    if new["text_encoder"]:
        metadata["result_text_sha256"] = delta.digest(before["text_encoder"] | new["text_encoder"])
    return metadata


def _write(path: pathlib.Path, new: dict, metadata: dict[str, str]) -> int:
    """Writes the tensors of both under PyTorch's names; returns how many these are."""
    tensors_of = dict(sorted((new["unet"] | new["text_encoder"]).items()))
    entries = [dataclasses.replace(tensor.entry, key=key) for key, tensor in tensors_of.items()]
    with new_file(path):
        safetensors.write(path, entries, lambda key, rows: tensors_of[key].read(rows), metadata=metadata)
    return len(tensors_of)


def write_drift(
    pipe: pipeline.Pipeline, drift: Mapping[str, Mapping[str, jax.Array]], path: str | os.PathLike, *, card: str,
    base: str, hashes: Mapping[str, str], about: Mapping[str, str] | None = None,
) -> int:  # fmt: skip
    """The delta file of a pipeline as loaded and a drift, without the export between.

    Equal, byte for byte, to what `write_delta` makes of `save_pipeline(pipe, drift=drift, card=card)`. drift: {"unet"
    or "text_encoder": {leaf path: array}}, in float32. base: the name of the base model; hashes: `base_hashes` of it.
    Returns how many tensors it holds. Raises `AegisError` if nothing was changed, if anything else would be, and for
    values that are not finite in the base's type, and `Stopped` on SIGTERM, as `write_delta` does.
    """
    strange = sorted(drift.keys() - set(delta.CARRIED))
    if strange:
        raise AegisError(f"a delta carries tensors of the UNet and the text encoder only, not of the {strange[0]}")
    with delta.opened_both(pipe.source.folder) as before:
        new: dict = {}
        for name in delta.CARRIED:
            leaves, moves = tensors.leaves_of(getattr(pipe, name), drift.get(name, {})), drift.get(name, {})
            found = {}
            for leaf in moves:
                key = convert.name_today(name, pipe.source.origins[name][leaf].key)
                old = before[name][key]
                found[key] = _Changed(old.entry, tensors.rows_like(old.file, old.header, old.entry.key, leaves[leaf]))
            new[name] = {key: x for key, x in sorted(found.items()) if not delta.is_equal(before[name][key], x)}
        if not any(new.values()):
            raise AegisError("the erasure has changed nothing: there is nothing to write")
        metadata = _metadata(before, new, hashes, about, base)
        metadata["card"] = card.encode(errors="replace").decode()
        return _write(path, new, metadata)


@dataclasses.dataclass(frozen=True)
class _Changed:
    """A tensor that stands in the place of one of a file: read(rows) gives it part by part."""

    entry: safetensors.Entry
    read: Callable

    def parts(self) -> Iterator[np.ndarray]:
        for rows in parts.split(self.entry.shape, self.entry.numpy_dtype.itemsize):
            yield np.ascontiguousarray(self.read(rows)).reshape(-1).view(np.uint8)


def check_path(path: str | os.PathLike, overwrite: bool) -> pathlib.Path:
    """Where a delta file shall go, expanded. Raises `AegisError` for a folder, and for what may not be replaced."""
    return checked_file(path, overwrite, "delta file", "erased.safetensors", delta.read_delta)


def _examined(erased, variant: str | None) -> folder.Folder:
    """The folder of an erased pipeline: of the base's variant where it has that, otherwise without, or of the one
    variant that it has."""
    path = hub.locate(erased)
    if (path / "pipeline" / "model_index.json").is_file() and not (path / "model_index.json").exists():
        path = path / "pipeline"  # of a run folder
    if variant is not None:
        with contextlib.suppress(AegisError):
            return folder.examine(path, variant)
    try:
        return folder.examine(path)
    except hub.OtherVariants:
        found = folder.variants(path, [child.name for child in path.iterdir()])
        if len(found) > 1:
            raise
        return folder.examine(path, *found)


def _check_others(result: folder.Folder, original: folder.Folder) -> None:
    """Refuses a pipeline of which anything but values of the UNet and the text encoder differs from its base."""
    agree.check_configs(result, original)
    for name in result.components:
        if name not in delta.CARRIED:
            _check_equal(name, result, original)
    left = [name for name in folder.NEED_WEIGHTS if name in original.components.keys() - result.components.keys()]
    if left:
        warnings.warn(
            f"{result.path} has no {left[0]}, but its base {original.path} does, and so has what a delta makes of it",
            stacklevel=3,
        )


def _check_equal(name: str, result: folder.Folder, original: folder.Folder) -> None:
    """Refuses a component whose weights are not the base's: a delta cannot carry them."""
    if name not in original.components:
        raise AegisError(
            f"{result.path} has a {name}, its base {original.path} has none: a delta carries UNet and text encoder only"
        )
    ours, theirs = result.components[name].weights, original.components[name].weights
    with (
        delta.opened(name, ours.headers if ours else ()) as after,
        delta.opened(name, theirs.headers if theirs else ()) as before,
    ):
        agree.check_entries(name, after, before, result.path, original.path)
        for key in before:
            if not delta.is_equal(before[key], after[key]):
                raise AegisError(
                    f"the {name} of {result.path} differs from that of {original.path}, first in {key!r}: a delta "
                    "carries UNet and text encoder only, so keep the whole folder"
                )


def _name(base) -> str:
    """A hub id whole; of a folder its name, since where it lay on somebody's disk is nobody's business."""
    return hub.expand(base).resolve().name if hub.expand(base).exists() else str(base)
