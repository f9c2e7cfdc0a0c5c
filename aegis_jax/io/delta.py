"""Delta files: the tensors in which an erased UNet differs from its base, instead of a whole pipeline.

A safetensors file under PyTorch's own keys and in the base's dtype, so that `load_state_dict(tensors, strict=False)` of
the UNet takes it; and of the text encoder, where an erasure has changed that: no key is both's. The tensors are the
changed ones themselves, not differences: what is applied is equal to the full export to the last bit. Its metadata tell
what it replaces:

  format, aegis_delta   pt, and the version of this format: 1 of the UNet alone, 2 with tensors of the text encoder
  base                  the name of the base model
  base_sha256           of the base's tensors that are replaced (see `digest`)
  unet_sha256           of all tensors of the base's UNet
  text_sha256           of all tensors of its text encoder
  result_sha256         of all tensors of the erased UNet; result_text_sha256: likewise, of version 2
  card, and any more    the erased pipeline's README.md, and what the caller says
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import BinaryIO

import jax
import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import agree, convert, export, folder, hub, parts, pipeline, safetensors, tensors
from aegis_jax.io.destination import checked_file, new_folder
from aegis_jax.models import layout
from aegis_jax.models.model import flatten, unflatten

VERSION, WITH_TEXT = "1", "2"
CARRIED = ("unet", "text_encoder")
_HASHES = ("base_sha256", "unet_sha256", "text_sha256", "result_sha256")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of an open file, read part by part."""

    file: BinaryIO
    header: safetensors.Header
    entry: safetensors.Entry

    def read(self, rows=...) -> np.ndarray:
        return safetensors.read_tensor(self.file, self.header, self.entry.key, rows=rows)

    def parts(self) -> Iterator[np.ndarray]:
        """Its bytes, in parts."""
        for rows in parts.split(self.entry.shape, self.entry.numpy_dtype.itemsize):
            yield self.read(rows).reshape(-1).view(np.uint8)


@contextlib.contextmanager
def opened(component: str, headers: Iterable[safetensors.Header]) -> Iterator[dict[str, Tensor]]:
    """{name that PyTorch has today: tensor} of a component's weight files, in the order of the names."""
    with contextlib.ExitStack() as stack:
        found = {}
        for header in headers:
            file = stack.enter_context(safetensors.open_unchanged(header))
            for key, entry in header.entries.items():
                found[convert.name_today(component, key)] = Tensor(file, header, entry)
        found.pop(None, None)
        yield dict(sorted(found.items()))


@contextlib.contextmanager
def opened_both(of: folder.Folder) -> Iterator[dict[str, dict[str, Tensor]]]:
    """{component: `opened`} of the two that a delta file carries."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(opened(name, of.components[name].weights.headers)) for name in CARRIED}


def digest(named: Mapping) -> str:
    """sha256 over key, PyTorch dtype, shape and bytes of the tensors, sorted by key.

    Keys, shapes and dtypes as PyTorch prints them: "conv_in.weight torch.float16 [320, 4, 3, 3]".
    """
    result = hashlib.sha256()
    for key in sorted(named):
        entry = named[key].entry
        result.update(f"{key} torch.{entry.numpy_dtype.name} {list(entry.shape)}".encode())
        for part in named[key].parts():
            result.update(part)
    return result.hexdigest()


def write_delta(
    erased, base, path: str | os.PathLike, *, revision: str | None = None, variant: str | None = None,
    about: Mapping[str, str] | None = None, overwrite: bool = False,
) -> int:  # fmt: skip
    """Writes the delta file that makes the pipeline `erased` of `base`; returns how many tensors it holds.

    erased: a diffusers folder whose UNet or text encoder was changed, by aegis_jax or another tool. base: the model
    that it was made of, as for `load_pipeline`; revision and variant are the base's. about: more metadata, e.g. the
    concepts. Only safetensors are read, part by part.

    Raises `AegisError` if anything but values of these two differs, if nothing does, or if `path` exists (with
    `overwrite`: is no delta file).
    """
    path = check_path(path, overwrite)
    original = folder.examine(hub.locate(base, revision=revision, variant=variant), variant)
    result = _examined(erased, variant)
    _check_others(result, original)
    with opened_both(original) as before, opened_both(result) as after:
        for name in CARRIED:
            agree.check_entries(name, after[name], before[name], result.path, original.path)
        new = {
            name: {key: tensor for key, tensor in after[name].items() if not _is_equal(before[name][key], tensor)}
            for name in CARRIED
        }
        if not any(new.values()):
            raise AegisError(f"the UNet of {result.path} is that of {original.path}: there is nothing to write")
        metadata = _metadata(before, new, base_hashes(original), about, _name(base))
        card = result.path / "README.md"
        if card.is_file():
            metadata["card"] = card.read_bytes().decode(errors="replace")
        path = check_path(path, overwrite)  # again: it took a while to read both models
        with safetensors.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return _write(path, new, metadata)


def _metadata(before: dict, new: dict, hashes: Mapping[str, str], about: Mapping[str, str] | None, base: str) -> dict:
    """What a delta file says of its tensors; before, new: {component: {name: tensor}}."""
    replaced = {key: before[name][key] for name in CARRIED for key in new[name]}
    metadata = dict(about or {}) | {"format": "pt", "aegis_delta": WITH_TEXT if new["text_encoder"] else VERSION}
    metadata |= {
        "base": base,
        "base_sha256": digest(replaced),
        **hashes,
        "result_sha256": digest(before["unet"] | new["unet"]),
    }
    if new["text_encoder"]:
        metadata["result_text_sha256"] = digest(before["text_encoder"] | new["text_encoder"])
    return metadata


def _write(path: pathlib.Path, new: dict, metadata: dict[str, str]) -> int:
    """Writes the tensors of both under PyTorch's names; returns how many these are."""
    tensors_of = dict(sorted((new["unet"] | new["text_encoder"]).items()))
    entries = [dataclasses.replace(tensor.entry, key=key) for key, tensor in tensors_of.items()]
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
    values that are not finite in the base's type.
    """
    strange = sorted(drift.keys() - set(CARRIED))
    if strange:
        raise AegisError(f"a delta carries tensors of the UNet and the text encoder only, not of the {strange[0]}")
    with opened_both(pipe.source.folder) as before:
        new: dict = {}
        for name in CARRIED:
            leaves, moves = tensors.leaves_of(getattr(pipe, name), drift.get(name, {})), drift.get(name, {})
            found = {}
            for leaf in moves:
                key = convert.name_today(name, pipe.source.origins[name][leaf].key)
                old = before[name][key]
                found[key] = _Changed(old.entry, tensors.rows_like(old.file, old.header, old.entry.key, leaves[leaf]))
            new[name] = {key: x for key, x in sorted(found.items()) if not _is_equal(before[name][key], x)}
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


def base_hashes(base: folder.Folder) -> dict[str, str]:
    """What a delta file's metadata say of a whole base model."""
    with opened_both(base) as named:
        return {"unet_sha256": digest(named["unet"]), "text_sha256": digest(named["text_encoder"])}


def apply_delta(model, path: str | os.PathLike) -> pipeline.Pipeline:
    """The pipeline `model` with the changed tensors of a delta file.

    model: a pipeline as loaded, or what `load_pipeline` takes. Exporting the result gives the folder that
    `write_applied` writes, and its parameters are those that loading this folder gives.

    Raises `AegisError` if the file is no whole delta, was made for another base model, or replaces a tensor that was
    changed since the pipeline was loaded.
    """
    loaded = model if isinstance(model, pipeline.Pipeline) else pipeline.load_pipeline(model)
    if loaded.source is None:
        raise AegisError("the pipeline was built in memory, a delta file needs the base model: load it from its files")
    source, models = loaded.source, {}
    with checked(path, source.folder) as new, opened_both(source.folder) as before:
        for name in CARRIED:
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
        checked(path, pipe.source.folder, hashes) as new,
        opened("unet", pipe.source.folder.components["unet"].weights.headers) as before,
    ):
        new = of_unet(new, path)
        for key in sorted(new.keys() & leaves.keys()):
            leaf = leaves[key]
            array = np.empty(shapes[leaf], np.float32)
            target = layout.to_torch(leaf, array)
            apart = new[key].read().astype(np.float32) - before[key].read().astype(np.float32)
            target[...] = apart.reshape(target.shape)
            drift[leaf] = array
        return drift, dict(next(iter(new.values())).header.metadata)


def of_unet(new: dict[str, dict[str, Tensor]], path) -> dict[str, Tensor]:
    """The tensors of a delta file that changes the UNet alone. Raises `AegisError` for another."""
    if new["text_encoder"]:
        raise AegisError(f"{path} changes the text encoder, and only changes of the UNet can be merged or made a LoRA")
    return new["unet"]


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
    with checked(path, original) as new:
        with new_folder(destination, overwrite=overwrite, needed=export.weight_bytes(original)) as (root, _):
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


def _write_weights(name: str, weights: folder.Weights, target: pathlib.Path, new: Mapping[str, Tensor]) -> None:
    """Writes a component's weight files with the tensors of `new` in the place of theirs."""

    def write(index, path):
        header = weights.headers[index]
        with safetensors.open_unchanged(header) as file:
            held = {key: new.get(convert.name_today(name, key)) for key in header.entries}
            here = {key: held[key] or Tensor(file, header, entry) for key, entry in header.entries.items()}
            entries = list(header.entries.values())
            safetensors.write(path, entries, lambda key, rows: here[key].read(rows), raw_header=header.raw)
        return sum(tensor is not None for tensor in held.values()), entries

    export.write_weights(weights, target, write)


def read_delta(path: str | os.PathLike) -> safetensors.Header:
    """The header of a delta file; `AegisError` if it is none, or of a later version."""
    path = hub.expand(path)
    if path.suffix in hub.PICKLES:
        raise AegisError(f"{path} is a pickle, which can run code when it is read: delta files are safetensors")
    header = safetensors.read_header(path)
    said = header.metadata or {}
    if "aegis_delta" not in said:
        raise AegisError(f"{path} is no delta file: its metadata lack aegis_delta; make one with `aegis delta`")
    if said["aegis_delta"] not in (VERSION, WITH_TEXT):
        found = said["aegis_delta"][:20]
        raise AegisError(
            f"{path} is a delta file of version {found!r}, known is {WITH_TEXT}: install a newer aegis_jax"
        )
    wanted = _HASHES if said["aegis_delta"] == VERSION else (*_HASHES, "result_text_sha256")
    missing = [name for name in wanted if not re.fullmatch("[0-9a-f]{64}", said.get(name, ""))]
    if missing or not header.entries:
        what = f"{missing[0]} in its metadata" if missing else "tensors"
        raise AegisError(f"{path} is a delta file without {what}: make or download it again")
    return header


@contextlib.contextmanager
def checked(
    path: str | os.PathLike, base: folder.Folder, hashes: Mapping[str, str] | None = None
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """{component: {name: tensor}} of a delta file that was made for `base` and is whole, while it is open. hashes:
    `base_hashes` of the base, where they are known."""
    header = read_delta(path)
    said, wrong = header.metadata, f"{header.path} was made for another base model than {base.path}"
    if said.get("base"):
        wrong += f" (for {said['base'][:200]})"
    with opened("unet", [header]) as found, opened_both(base) as old:
        new = {name: {key: found[key] for key in found.keys() & old[name].keys()} for name in CARRIED}
        if said["aegis_delta"] == VERSION:  # of the UNet alone
            new = {"unet": found, "text_encoder": {}}
        new["unet"] |= {key: x for key, x in found.items() if key not in new["text_encoder"]}  # strange ones are told
        for name in CARRIED:
            agree.check_entries(name, new[name], {key: old[name].get(key) for key in new[name]}, header.path, base.path)
        if digest({key: old[name][key] for name in CARRIED for key in new[name]}) != said["base_sha256"]:
            raise AegisError(f"{wrong}: the tensors that it replaces differ; give the base model that it was made of")
        if (hashes["unet_sha256"] if hashes else digest(old["unet"])) != said["unet_sha256"]:
            raise AegisError(f"{wrong}: other tensors of the UNet differ; give the base model that it was made of")
        if (hashes["text_sha256"] if hashes else digest(old["text_encoder"])) != said["text_sha256"]:
            raise AegisError(f"{wrong}: its text encoder is another; give the base model that it was made of")
        results = {"unet": "result_sha256"} | ({"text_encoder": "result_text_sha256"} if new["text_encoder"] else {})
        if any(digest(old[name] | new[name]) != said.get(hashed) for name, hashed in results.items()):
            raise AegisError(f"{header.path} is damaged, its tensors are not those it was written with: copy it again")
        yield new


def _leaf(path: str, leaf: jax.Array, tensor: np.ndarray) -> jax.Array:
    """A tensor as the leaf that it replaces: laid out, cast and placed alike."""
    array = np.empty(leaf.shape, leaf.dtype)
    with np.errstate(over="ignore"):
        target = layout.to_torch(path, array)
        target[...] = tensor.reshape(target.shape)
    return jax.device_put(array, leaf.sharding)


def check_path(path: str | os.PathLike, overwrite: bool) -> pathlib.Path:
    """Where a delta file shall go, expanded. Raises `AegisError` for a folder, and for what may not be replaced."""
    return checked_file(path, overwrite, "delta file", "erased.safetensors", read_delta)


def _examined(erased, variant: str | None) -> folder.Folder:
    """The folder of an erased pipeline: of the base's variant where it has that, otherwise without."""
    path = hub.locate(erased)
    if (path / "pipeline" / "model_index.json").is_file() and not (path / "model_index.json").exists():
        path = path / "pipeline"  # of a run folder
    if variant is not None:
        with contextlib.suppress(AegisError):
            return folder.examine(path, variant)
    return folder.examine(path)


def _check_others(result: folder.Folder, original: folder.Folder) -> None:
    """Refuses a pipeline of which anything but values of the UNet and the text encoder differs from its base."""
    agree.check_configs(result, original)
    for name in result.components:
        if name not in CARRIED:
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
    with opened(name, ours.headers if ours else ()) as after, opened(name, theirs.headers if theirs else ()) as before:
        agree.check_entries(name, after, before, result.path, original.path)
        for key in before:
            if not _is_equal(before[key], after[key]):
                raise AegisError(
                    f"the {name} of {result.path} differs from that of {original.path}, first in {key!r}: a delta "
                    "carries UNet and text encoder only, so keep the whole folder"
                )


def _is_equal(one: Tensor, other) -> bool:
    """Whether two tensors of the same size have the same bytes."""
    if parts.split(one.entry.shape, 1) == parts.split(other.entry.shape, 1):
        return all(np.array_equal(a, b) for a, b in zip(one.parts(), other.parts(), strict=True))
    return np.array_equal(one.read().reshape(-1).view(np.uint8), other.read().reshape(-1).view(np.uint8))


def _name(base) -> str:
    """A hub id whole; of a folder its name, since where it lay on somebody's disk is nobody's business."""
    return hub.expand(base).resolve().name if hub.expand(base).exists() else str(base)
