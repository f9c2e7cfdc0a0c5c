"""Delta files (delta.py) applied: to a pipeline as loaded, or to a model's files, part by part."""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Mapping

import jax
import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import convert, delta, export, folder, hub, pipeline, safetensors, tensors
from aegis_jax.io.destination import new_folder
from aegis_jax.models import layout
from aegis_jax.models.model import flatten, unflatten


def apply_delta(model, path: str | os.PathLike) -> pipeline.Pipeline:
    """The pipeline `model` with the changed tensors of a delta file.

    model: a pipeline as loaded, or what `load_pipeline` takes. Exporting the result gives the folder that
    `write_applied` writes, and its parameters are those that loading this folder gives.

    Raises `AegisError` if the file is no whole delta, was made for another base model, or replaces a tensor that was
    changed since the pipeline was loaded.
    """
    path = hub.expand(path)
    loaded = model if isinstance(model, pipeline.Pipeline) else pipeline.load_pipeline(model)
    if loaded.source is None:
        raise AegisError("the pipeline was built in memory, a delta file needs the base model: load it from its files")
    source, models = loaded.source, {}
    with delta.checked(path, source.folder) as new, delta.opened_both(source.folder) as before:
        for name in delta.CARRIED:
            keys = {convert.name_today(name, origin.key): leaf for leaf, origin in source.origins[name].items()}
            model = getattr(loaded, name)
            leaves = dict(flatten(model.params))
            for key in new[name].keys() & keys.keys():  # the others are read past by PyTorch too
                leaf, old = keys[key], before[name][key]
                if not tensors.is_same(old.file, old.header, old.entry.key, tensors.Leaf(leaf, leaves[leaf])):
                    raise AegisError(
                        f"{key!r} was changed since the pipeline was loaded: apply {path} to the base model"
                    )
                leaves[leaf] = _leaf(leaf, leaves[leaf], new[name][key].read())
            if new[name]:
                models[name] = dataclasses.replace(model, params=unflatten(leaves))
    return dataclasses.replace(loaded, **models)


def read_drift(
    pipe: pipeline.Pipeline, path: str | os.PathLike, hashes: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({leaf path: what a delta file adds to the UNet, float32}, the file's metadata).

    pipe: as loaded from its files; hashes: `base_hashes` of these, so that of many delta files of one base each costs
    one pass over the UNet and not three. Raises `AegisError` as `apply_delta` does, and if the text encoder is changed.
    """
    leaves = {origin.key: leaf for leaf, origin in pipe.source.origins["unet"].items()}
    shapes = {leaf: array.shape for leaf, array in flatten(pipe.unet.params).items()}
    drift = {}
    with (
        delta.checked(path, pipe.source.folder, hashes) as new,
        delta.opened("unet", pipe.source.folder.components["unet"].weights.headers) as before,
    ):
        new = delta.of_unet(new, path)
        for key in sorted(new.keys() & leaves.keys()):
            leaf = leaves[key]
            array = np.empty(shapes[leaf], np.float32)
            target = layout.to_torch(leaf, array)
            apart = new[key].read().astype(np.float32) - before[key].read().astype(np.float32)
            target[...] = apart.reshape(target.shape)
            drift[leaf] = array
        return drift, dict(next(iter(new.values())).header.metadata)


def write_applied(
    path: str | os.PathLike, base, destination: str | os.PathLike, *, revision: str | None = None,
    variant: str | None = None, overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes the pipeline that a delta file makes of its base, as the full export would have been written.

    base, revision, variant: the base model as for `load_pipeline`. Files are copied part by part, no model is loaded.
    Raises `AegisError` as `apply_delta` and `save_pipeline` do.
    """
    inside, outside = hub.expand(path).resolve(), hub.expand(destination).resolve()
    if inside.is_relative_to(outside):
        raise AegisError(f"{inside} lies in {outside}, which would be replaced: move it, or choose another folder")
    original = folder.examine(hub.locate(base, revision=revision, variant=variant), variant)
    export.check_whole(original)
    with delta.checked(path, original) as new:
        needed = export.weight_bytes(original)
        with new_folder(destination, overwrite=overwrite, needed=needed, source=original.path) as (root, _):
            export.copy_root(original, root)
            for name, component in original.components.items():
                target = root / name
                target.mkdir()
                for file in component.files:
                    export.copy_file(file, target)
                if component.weights:
                    _write_weights(name, component.weights, target, new.get(name, {}))
            card = next(tensor for each in new.values() for tensor in each.values()).header.metadata.get("card")
            if card is not None:
                export.write_bytes(root / "README.md", card.encode(errors="replace"))


def command(path, base, revision: str | None = None, variant: str | None = None) -> str:
    """What to type to apply a delta file, DIR standing for the new folder; the base as for `write_applied`."""
    weights = {"--revision": revision, "--variant": variant}
    given = [part for option, value in weights.items() if value for part in (option, value)]
    return shlex.join(["aegis", "apply", str(path), "--model", str(base), *given, "--out", "DIR"])


def _write_weights(name: str, weights: folder.Weights, target: pathlib.Path, new: Mapping[str, delta.Tensor]) -> None:
    """Writes a component's weight files with the tensors of `new` in the place of theirs."""

    def write(index, path):
        header = weights.headers[index]
        with safetensors.open_unchanged(header) as file:
            held = {key: new.get(convert.name_today(name, key)) for key in header.entries}
            here = {key: held[key] or delta.Tensor(file, header, entry) for key, entry in header.entries.items()}
            entries = list(header.entries.values())
            safetensors.write(path, entries, lambda key, rows: here[key].read(rows), raw_header=header.raw)
        return sum(tensor is not None for tensor in held.values()), entries

    export.write_weights(weights, target, write)


def _leaf(path: str, leaf: jax.Array, tensor: np.ndarray) -> jax.Array:
    """A tensor as the leaf that it replaces: laid out, cast and placed alike."""
    array = np.empty(leaf.shape, leaf.dtype)
    with np.errstate(over="ignore"):
        target = layout.to_torch(path, array)
        target[...] = tensor.reshape(target.shape)
    return jax.device_put(array, leaf.sharding)
