"""A delta file as a LoRA: of the change of each matrix the nearest of a low rank (Eckart and Young), in float32.

What it cannot say is lost: the rest of each change, and changes of biases and norms. `write_lora` says how much. Names:

  peft    unet.MODULE.lora_A.weight (rank, in), lora_B.weight (out, rank), as diffusers' `load_lora_weights` reads;
          of a convolution (rank, in, h, w) and (out, rank, 1, 1). Added to the weight is B A.
  kohya   lora_unet_MODULE with _ for ., .lora_down.weight, .lora_up.weight and .alpha, the rank, by which the same is
          added; diffusers reads these too.
"""

import math
import os
import pathlib

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import delta, folder, hub, safetensors
from aegis_jax.io.destination import checked_file, new_file

NAMES = ("peft", "kohya")


def write_lora(
    path: str | os.PathLike, base, out: str | os.PathLike, *, rank: int, names: str = "peft",
    revision: str | None = None, variant: str | None = None, overwrite: bool = False,
) -> tuple[int, float]:  # fmt: skip
    """Writes the LoRA of a delta file; returns (how many matrices it has, its relative error).

    base, revision, variant: the base model, as for `load_pipeline`. The error is the Frobenius norm of what is lost of
    the whole change over that of the change. Raises `AegisError` as `apply_delta` does, if no matrix is changed, if
    none can have that rank, and if `out` exists (with `overwrite`: is no LoRA).
    """
    if rank < 1:
        raise AegisError(f"rank {rank}: wanted 1 or more")
    if names not in NAMES:
        raise AegisError(f"names {names!r}: wanted one of {', '.join(NAMES)}")
    out = _checked_out(out, overwrite)
    original = folder.examine(hub.locate(base, revision=revision, variant=variant), variant)
    tensors: dict[str, np.ndarray] = {}
    whole = lost = 0.0
    with (
        delta.checked(path, original) as found,
        delta.opened("unet", original.components["unet"].weights.headers) as old,
    ):
        new = delta.of_unet(found, path)
        shapes = [new[key].entry.shape for key in new.keys() & old.keys()]
        ranks = [min(shape[0], math.prod(shape[1:])) for shape in shapes if len(shape) in (2, 4)]
        if ranks and rank > max(ranks):  # more would be zeros alone
            raise AegisError(f"rank {rank}: wanted at most {max(ranks)}, the largest that a change in {path} can have")
        for key in sorted(new.keys() & old.keys()):
            change = new[key].read().astype(np.float64) - old[key].read().astype(np.float64)
            if not np.isfinite(change).all():
                raise AegisError(f"{key!r} is not finite: there is no LoRA of it")
            whole += float((change**2).sum())
            if change.ndim in (2, 4):
                matrix = change.reshape(len(change), -1)
                down, up = low_rank(matrix, rank)
                lost += float(((matrix - up @ down.astype(np.float64)) ** 2).sum())
                down, up = down.reshape(rank, *change.shape[1:]), up.reshape(*up.shape, *(1,) * (change.ndim - 2))
                tensors |= _named(key.removesuffix(".weight"), down, up, names)
            else:
                lost += float((change**2).sum())
        said = dict(next(iter(new.values())).header.metadata)
    if not tensors:
        raise AegisError(f"{path} changes no matrix: a LoRA can say nothing of it")
    if not whole:
        raise AegisError(f"{path} changes nothing but the signs of zeros: a LoRA can say nothing of it")
    metadata = {key: said[key] for key in ("base", "concepts", "method") if key in said} | {"format": "pt"}
    metadata["aegis_lora"] = f"{np.sqrt(lost / whole):.4f}"  # what is lost
    if names == "kohya":
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    entries = [safetensors.Entry(key, "F32", x.shape) for key, x in tensors.items()]
    with new_file(_checked_out(out, overwrite)):  # again: it took a while to read both
        safetensors.write(out, entries, lambda key, rows: tensors[key][rows], metadata=metadata)
    return sum(key.endswith(("lora_A.weight", "lora_down.weight")) for key in tensors), float(np.sqrt(lost / whole))


def low_rank(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """down (rank, n), up (m, rank), float32: up @ down is the matrix of that rank nearest to one (m, n) in float64.

    Both are equally large. A rank above m or n is filled up with zeros, since readers want one rank for all matrices.
    """
    m, n = matrix.shape
    # Of the smaller Gram matrix: a convolution's n is up to 23,040.
    values, vectors = np.linalg.eigh(matrix @ matrix.T if m <= n else matrix.T @ matrix)
    vectors = vectors[:, ::-1][:, :rank]
    scale = np.sqrt(np.sqrt(np.clip(values[::-1][:rank], 0, None)))  # the root of each singular value
    kept = np.where(scale > 0, scale, 1.0)
    if m <= n:
        up, down = vectors * scale, (vectors.T @ matrix) / kept[:, None]
    else:
        up, down = (matrix @ vectors) / kept, (vectors * scale).T
    more = rank - len(scale)
    return np.pad(down, ((0, more), (0, 0))).astype(np.float32), np.pad(up, ((0, 0), (0, more))).astype(np.float32)


def _named(module: str, down: np.ndarray, up: np.ndarray, names: str) -> dict[str, np.ndarray]:
    if names == "peft":
        return {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
    stem = f"lora_unet_{module.replace('.', '_')}"
    alpha = np.full((), len(down), np.float32)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}


def _checked_out(path: str | os.PathLike, overwrite: bool) -> pathlib.Path:
    return checked_file(path, overwrite, "LoRA of aegis_jax", "lora.safetensors", _read)


def _read(path: pathlib.Path) -> None:
    if "aegis_lora" not in (safetensors.read_header(path).metadata or {}):
        raise AegisError(f"{path} is no LoRA of aegis_jax")
