"""Reading and writing safetensors files, strictly and part by part.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the tensors' bytes without gaps. The header is parsed here, not by the `safetensors` package,
for three reasons: a broken file is reported by file and tensor, peak memory stays a few parts of tensors
above what the caller keeps (mapped pages count twice), and a file can be written part by part with
the key order and metadata of the file it came from.
"""

import collections
import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator
from types import EllipsisType
from typing import BinaryIO

import ml_dtypes
import numpy as np

from aegis_jax.errors import AegisError, SourceGone
from aegis_jax.io import parts

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the format's reference implementation
AGAIN = "the file is truncated or damaged: download or copy it again"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: key, safetensors dtype name, shape, and where its bytes are."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0  # absolute offset in the file
    stop: int = 0

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself, and the state of the file when it said so.

    `entries` keep the order of the header's keys; `raw` is the header as stored, with its padding,
    so that a copy can be identical to the last byte. `size` and `mtime_ns` show later whether the
    file has changed.
    """

    path: pathlib.Path
    entries: dict[str, Entry]
    metadata: dict[str, str] | None
    raw: bytes
    size: int
    mtime_ns: int


def dtype_name(dtype) -> str:
    """The safetensors name of a parameter dtype: F32, F16 or BF16; `AegisError` for others."""
    try:
        name = _NAMES.get(np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
    except TypeError:
        name = None
    if name not in {"F32", "F16", "BF16"}:
        raise AegisError(f"dtype {dtype!r} is not supported: use float32, float16 or bfloat16")
    return name


def read_header(path: str | os.PathLike) -> Header:
    """Parses and checks the header of one file; reads no tensor.

    Raises `AegisError` (one line: file, tensor, found, wanted) for anything that is not a
    well-formed file whose tensors fill it exactly.
    """
    path = pathlib.Path(path)
    with _opened(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        start = file.read(8)
        _refuse_other_formats(path, start)
        if len(start) < 8:
            raise AegisError(f"{path}: {size} bytes are too few for a safetensors file; {AGAIN}")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER:
            raise AegisError(
                f"{path}: the header claims {length} bytes, safetensors allows {MAX_HEADER}; "
                "the file is damaged or not safetensors: download or copy it again"
            )
        if 8 + length > size:
            raise AegisError(f"{path}: the header claims {length} bytes but the file has {size}; {AGAIN}")
        raw = file.read(length)
    entries, metadata = _parse(path, raw)
    _check_layout(path, entries, first=8 + length, size=size)
    return Header(path, entries, metadata, raw, size, status.st_mtime_ns)


def read_tensor(
    file: BinaryIO, header: Header, key: str, buffer: np.ndarray | None = None, rows: slice | EllipsisType = ...
) -> np.ndarray:
    """One tensor, or some rows of it (see `parts.split`), in the file's own dtype and shape.

    buffer: uint8 array of at least that size to read into; the result is then a view of it. The
    file's position is neither used nor changed: several threads may read at once.
    """
    whole = header.entries[key]
    part = _rows(whole, rows)
    target = (np.empty(part.nbytes, np.uint8) if buffer is None else buffer)[: part.nbytes]
    read = 0
    while read < part.nbytes:
        count = os.preadv(file.fileno(), [target[read:]], part.start + read)
        if count == 0:
            found = part.start + read - whole.start
            raise SourceGone(f"{header.path}: tensor {key!r} ends after {found} of {whole.nbytes} bytes; {AGAIN}")
        read += count
    return target.view(part.numpy_dtype).reshape(part.shape)


def _rows(entry: Entry, rows: slice | EllipsisType) -> Entry:
    """What `entry` would be if its tensor had these rows only."""
    if rows is ...:
        return entry
    row = entry.nbytes // entry.shape[0]
    start, stop = entry.start + rows.start * row, entry.start + rows.stop * row
    return dataclasses.replace(entry, shape=(rows.stop - rows.start, *entry.shape[1:]), start=start, stop=stop)


@contextlib.contextmanager
def open_unchanged(header: Header) -> Iterator[BinaryIO]:
    """The file of `header` for reading; `SourceGone` if it vanished or changed since then."""
    with _opened(header.path) as file:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (header.size, header.mtime_ns):
            raise SourceGone(
                f"{header.path} has changed since it was loaded: load the pipeline again before exporting it"
            )
        yield file


def write(
    path: str | os.PathLike,
    entries: Iterable[Entry],
    part: Callable[[str, slice | EllipsisType], np.ndarray],
    *,
    metadata: dict[str, str] | None = None,
    raw_header: bytes | None = None,
) -> None:
    """Writes a file part by part.

    part(key, rows) gives some rows of a tensor (see `parts.split`). It is called in several threads,
    once for each part; no more parts than there are threads are held at a time.
    entries: key, dtype, shape in the order of the header's keys; where `raw_header` is given they
    must be the entries of that header, which is then written as it is. Otherwise the tensors' bytes
    are ordered by falling item size, so that every tensor is aligned. The file appears under its
    name only when it is complete and on the disk; a failure leaves nothing behind. A full disk
    raises `AegisError`.
    """
    path = pathlib.Path(path)
    entries = list(entries)
    if raw_header is None:
        raw_header, entries = _make_header(entries, metadata)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(unfinished, "wb") as file:
                file.write(struct.pack("<Q", len(raw_header)))
                file.write(raw_header)
                file.flush()

                def write_part(job):
                    entry, rows = job
                    place = _rows(entry, rows)
                    _write_at(file.fileno(), _bytes(place, part(entry.key, rows)), place.start)

                jobs = [(e, rows) for e in entries for rows in parts.split(e.shape, e.numpy_dtype.itemsize)]
                parts.on_all_cores(write_part, sorted(jobs, key=lambda job: job[0].start))
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns the operating system's refusals while writing `path` into `AegisError`."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise AegisError(
                f"no space left while writing {path}: nothing was kept of it; free some space or choose another folder"
            ) from error
        raise AegisError(f"cannot write {path}: {error.strerror or error}") from error


def _make_header(entries: list[Entry], metadata: dict[str, str] | None) -> tuple[bytes, list[Entry]]:
    """The header's bytes, and the entries with their places in the file."""
    offsets, end = {}, 0
    for entry in sorted(entries, key=lambda entry: -entry.numpy_dtype.itemsize):
        offsets[entry.key] = [end, end + entry.nbytes]
        end += entry.nbytes
    fields: dict = {} if metadata is None else {"__metadata__": metadata}
    for entry in entries:
        fields[entry.key] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": offsets[entry.key],
        }
    raw = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the tensors begin at a multiple of 8
    first = 8 + len(raw)
    placed = [
        dataclasses.replace(entry, start=first + offsets[entry.key][0], stop=first + offsets[entry.key][1])
        for entry in entries
    ]
    return raw, placed


def _write_at(descriptor: int, content: memoryview, start: int) -> None:
    first = start
    while content:
        count = os.pwrite(descriptor, content, start)
        content, start = content[count:], start + count
    if start > first and hasattr(os, "posix_fadvise"):  # not on macOS; of length 0 would be the whole file
        # On Linux this sends what was written to the disk while the next part is laid out, for fsync waits for all
        # that is not there yet.
        with contextlib.suppress(OSError):  # advice only
            os.posix_fadvise(descriptor, first, start - first, os.POSIX_FADV_DONTNEED)


def _bytes(entry: Entry, array: np.ndarray) -> memoryview:
    if array.shape != entry.shape or array.dtype != entry.numpy_dtype:
        raise TypeError(
            f"tensor {entry.key!r}: {array.dtype}{array.shape} given, "
            f"{entry.numpy_dtype}{entry.shape} announced in the header"
        )
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[BinaryIO]:
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise SourceGone(f"{path} does not exist") from None
    except OSError as error:
        raise SourceGone(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        yield file


def _refuse_other_formats(path: pathlib.Path, start: bytes) -> None:
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}):
        # A pickle begins with its protocol number; as a header length it would be absurd anyway.
        if start.startswith(b"PK") or start[2:3] in {b"}", b"]", b"c", b"\x8a", b"\x95"}:
            raise AegisError(
                f"{path} is a PyTorch pickle under a safetensors name; pickles can run code "
                "and are not read: save the model again in PyTorch with safe_serialization=True"
            )
    if start == b"version ":
        raise AegisError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")


def _parse(path: pathlib.Path, raw: bytes) -> tuple[dict[str, Entry], dict[str, str] | None]:
    if raw[:1] != b"{":
        raise AegisError(f"{path}: the header is not a JSON object; {AGAIN}")
    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise AegisError(f"{path}: the header's JSON is nested too deeply; {AGAIN}") from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        reason = " ".join(str(error).split())[:120]
        raise AegisError(f"{path}: the header is not valid JSON ({reason}); {AGAIN}") from None
    metadata = fields.pop("__metadata__", None) if "__metadata__" in fields else None
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise AegisError(f"{path}: __metadata__ is not a table of strings; {AGAIN}")
    try:
        "".join([*(metadata or {}), *(metadata or {}).values()]).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which could be written to no file
        raise AegisError(f"{path}: __metadata__ is not valid Unicode; {AGAIN}") from None
    return {key: _entry(path, key, value, 8 + len(raw)) for key, value in fields.items()}, metadata


def _unique(pairs: list[tuple]) -> dict:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"key {_short(next(key for key, count in counts.items() if count > 1))} appears twice")
    return table


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _short(key: str) -> str:
    """The key as shown in a message: quoted, on one line, printable."""
    return ascii(key) if len(key) <= 100 else ascii(key[:100]) + "..."


def _entry(path: pathlib.Path, key: str, fields, first: int) -> Entry:
    where = f"{path}: tensor {_short(key)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise AegisError(f"{where}: its header entry needs exactly dtype, shape and data_offsets; {AGAIN}")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise AegisError(f"{where}: the name is not valid Unicode; {AGAIN}") from None
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AegisError(f"{where}: dtype {_short(str(dtype))} is unknown; known are {', '.join(DTYPES)}")
    if not _is_sizes(shape):
        raise AegisError(f"{where}: shape {_short(str(shape))} is not a list of sizes; {AGAIN}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise AegisError(f"{where}: data_offsets {_short(str(offsets))} is not a [start, end] pair; {AGAIN}")
    entry = Entry(key, dtype, tuple(shape), first + offsets[0], first + offsets[1])
    if entry.nbytes != offsets[1] - offsets[0]:
        raise AegisError(
            f"{where}: {dtype} of shape {_short(str(shape))} "
            f"needs {_short(str(entry.nbytes))} bytes, "
            f"its offsets give {_short(str(offsets[1] - offsets[0]))}; {AGAIN}"
        )
    return entry


def _is_sizes(value) -> bool:
    # Few and below 2**63: larger numbers are no tensor, only slow to multiply and to print.
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def _check_layout(path: pathlib.Path, entries: dict[str, Entry], *, first: int, size: int) -> None:
    """Tensors must follow each other without gap or overlap from the header to the file's end."""
    end, previous = first, "the header"
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        where = f"{path}: tensor {_short(entry.key)}"
        if entry.stop > size:
            raise AegisError(f"{where} should end at byte {entry.stop} but the file has {size}; {AGAIN}")
        if entry.start != end:
            kind = "overlaps with" if entry.start < end else "leaves a gap after"
            raise AegisError(
                f"{where} begins at byte {entry.start} and {kind} {previous}, which ends at {end}; {AGAIN}"
            )
        end, previous = entry.stop, _short(entry.key)
    if end != size:
        raise AegisError(f"{path}: the tensors end at byte {end} but the file has {size}; {AGAIN}")
