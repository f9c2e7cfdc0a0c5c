"""Parameters -> weight files, part by part, as close to the source's files as what was changed allows."""

import contextlib
import dataclasses
import functools
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io import parts, safetensors, tiles
from aegis_jax.models import layout
from aegis_jax.models.model import Model, flatten

_FLOAT32 = np.dtype(np.float32)
_COMPARED = 1 << 18  # bytes that are compared at a time


@dataclasses.dataclass(frozen=True)
class Leaf:
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

    def __init__(self, leaves: dict[str, Leaf]):
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


def leaves_of(model: Model, drift: Mapping) -> dict[str, Leaf]:
    leaves = flatten(model.params)
    strange = sorted(set(drift) - leaves.keys())
    if strange:
        raise AegisError(f"the drift is of another model, which has {strange[0]}: take the pipeline it was trained on")
    make = {path: functools.partial(_made, drift, path, leaves[path].shape) for path in drift}
    return {path: Leaf(path, array, make.get(path)) for path, array in leaves.items()}


def _made(drift: Mapping, path: str, shape: tuple[int, ...]) -> jax.Array:
    """What a drift adds to a leaf. Its shape is known only now: the mapping may make its arrays when asked."""
    move = drift[path]
    if np.shape(move) != shape:  # NumPy would spread it over the tensor, or refuse without a name
        raise AegisError(
            f"the drift of {path} has shape {np.shape(move)}, wanted {shape}: take the pipeline it was trained on"
        )
    return move


def check(leaves, origins, weights, component: str) -> None:
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


def write_like(
    header: safetensors.Header, here: dict[str, Leaf], path: pathlib.Path, dtype: str | None
) -> tuple[int, list[safetensors.Entry]]:
    """Writes one weight file like `header`; `here` = {key: leaf} of its parameters."""
    with safetensors.open_unchanged(header) as file:
        here = dict(zip(here, parts.on_all_cores(lambda key: _in_full(file, header, key, here[key]), here)))
        # The header comes first and has to know which tensors change type.
        same = parts.on_all_cores(lambda key: is_same(file, header, key, here[key]), here)
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


def rows_like(file, header: safetensors.Header, key: str, leaf: Leaf) -> Callable:
    """What gives rows of a leaf as they are written in the place of a source tensor."""
    leaf = _in_full(file, header, key, leaf)
    return functools.partial(_part_of({key: leaf}, [header.entries[key]]), key)


def _part_of(leaves: dict[str, Leaf], entries: list[safetensors.Entry]) -> Callable:
    """What gives `safetensors.write` the parts of leaves, as `entries` say."""
    entries, drifts = {entry.key: entry for entry in entries}, _Drifts(leaves)

    def part(key, rows):
        entry = entries[key]
        with drifts.of(key, len(parts.split(entry.shape, entry.numpy_dtype.itemsize))) as drift:
            tensor = leaves[key].rows(rows, drift)
        return _cast(tensor, entry.numpy_dtype, key).reshape(-1, *entry.shape[1:]) if entry.shape else tensor

    return part


def _in_full(file, header: safetensors.Header, key: str, leaf: Leaf) -> Leaf:
    """The leaf, to be read from its source if that has bits that were lost when it was loaded.

    Their rounding would go into the export with the drift. An array that was changed since it was loaded stays.
    """
    if leaf.drift is None or leaf.dtype == leaf.array.dtype:
        return leaf
    if not is_same(file, header, key, dataclasses.replace(leaf, drift=None)):
        return leaf
    return dataclasses.replace(leaf, source=lambda rows: safetensors.read_tensor(file, header, key, rows=rows))


def is_same(file, header: safetensors.Header, key: str, leaf: Leaf) -> bool:
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


def write_whole(leaves: dict[str, Leaf], path: pathlib.Path, dtype: str) -> int:
    leaves = {layout.torch_key(name): leaf for name, leaf in leaves.items()}
    entries = [
        safetensors.Entry(key, dtype, layout.torch_shape(leaf.path, leaf.array.shape))
        for key, leaf in sorted(leaves.items())
    ]
    # transformers refuses files that do not say which framework's layout they have.
    safetensors.write(path, entries, _part_of(leaves, entries), metadata={"format": "pt"})
    return len(entries)
