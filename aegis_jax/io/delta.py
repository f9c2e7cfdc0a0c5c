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
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import agree, convert, folder, hub, parts, safetensors

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


def base_hashes(base: folder.Folder) -> dict[str, str]:
    """What a delta file's metadata say of a whole base model."""
    with opened_both(base) as named:
        return {"unet_sha256": digest(named["unet"]), "text_sha256": digest(named["text_encoder"])}


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
        check_finite(new, header.path)
        yield new


def check_finite(new: Mapping[str, Mapping[str, Tensor]], path: os.PathLike) -> None:
    """Refuses changed tensors, {component: {name: tensor}}, with NaN or infinity; path: what a message names."""
    for name, tensors in new.items():
        for key, tensor in tensors.items():
            if not all(np.isfinite(part.view(tensor.entry.numpy_dtype)).all() for part in tensor.parts()):
                raise AegisError(
                    f"{path}: {name}'s {key!r} has values that are not finite; training has diverged: erase again, or "
                    "take an earlier checkpoint"
                )


def of_unet(new: dict[str, dict[str, Tensor]], path) -> dict[str, Tensor]:
    """The tensors of a delta file that changes the UNet alone. Raises `AegisError` for another."""
    if new["text_encoder"]:
        raise AegisError(f"{path} changes the text encoder, and only changes of the UNet can be merged or made a LoRA")
    return new["unet"]


def is_equal(one: Tensor, other) -> bool:
    """Whether two tensors of the same size have the same bytes."""
    if parts.split(one.entry.shape, 1) == parts.split(other.entry.shape, 1):
        return all(np.array_equal(a, b) for a, b in zip(one.parts(), other.parts(), strict=True))
    return np.array_equal(one.read().reshape(-1).view(np.uint8), other.read().reshape(-1).view(np.uint8))
