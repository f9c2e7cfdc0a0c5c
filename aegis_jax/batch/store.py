"""Where a batch lies: a folder or a bucket, as keys with values that are created once or swapped.

tensorstore's key-value stores do both atomically on files (of a local disk, or of a network file system with locks)
and on Google Cloud Storage. Nothing is removed, appended to or renamed here, which buckets cannot do, or not at once.
"""

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

import tensorstore

from aegis_jax.errors import AegisError
from aegis_jax.io.hub import expand

PLAN = "plan.jsonl"  # the first that is written into a batch
# Of the file systems in user space those that are no gateway to a bucket, and keep locks and whole files.
_SOUND_FUSE = {"fuseblk", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.juicefs", "fuse.fuse-overlayfs"}


class Unanswered(AegisError):
    """A store does not do what it was asked, and may at another time."""


# What another attempt finds again: no permission, a file too large, a full disk, a read-only one, a quota.
_LASTING = re.compile(
    rf"os_error_code='({errno.EACCES}|{errno.EFBIG}|{errno.ENOSPC}|{errno.EROFS}|{errno.EDQUOT})'"
    "|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED"
)


class Store:
    """Values by key. Generations are what a value's versions are told apart by: opaque, never "absent"."""

    def __init__(self, kvstore, place: str, folder: Path | None = None):
        self.place = place  # as users name it
        self._kvstore, self._folder = kvstore, folder
        self._absent = self._asked(kvstore.read("no-such-key")).stamp.generation

    def read(self, key: str) -> tuple[bytes | None, bytes]:
        """(value, generation); (None, b"") where there is none."""
        return self.read_all([key])[0]

    def read_all(self, keys: Iterable[str]) -> list[tuple[bytes | None, bytes]]:
        """The same of many keys, asked for at the same time."""
        found = map(self._asked, [self._kvstore.read(key) for key in keys])
        return [(x.value, x.stamp.generation) if x.state == "value" else (None, b"") for x in found]

    def create(self, key: str, value: bytes) -> bytes | None:
        """Writes a value where there is none; its generation, or None if there is one."""
        return self.swap(key, value, self._absent)

    def swap(self, key: str, value: bytes, generation: bytes) -> bytes | None:
        """Writes a value in the place of that of a generation; its own, or None if another has come between.

        A writer that was killed leaves a file that the next one writes over, and what was longer there stays behind the
        value (tensorstore 0.1.86): such a value is written once more, to a new file. Who reads it in between sees the
        whole value and that rest, so values that change are lines.
        """
        made = self._asked(self._kvstore.write(key, value, if_equal=generation)).generation or None
        if made and self._folder and (self._folder / key).stat().st_size > len(value):
            made = self._asked(self._kvstore.write(key, value, if_equal=made)).generation or made
        return made

    def names(self, folder: str) -> set[str]:
        """What lies in a folder, without its path."""
        prefix = f"{folder}/"
        keys = tensorstore.KvStore.KeyRange(prefix, f"{folder}0")  # "0" is what comes after "/"
        return {key.decode() for key in self._asked(self._kvstore.list(keys, strip_prefix_length=len(prefix)))}

    def _asked(self, future):
        try:
            return future.result()
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            reason = re.sub(r"\s*\[(source locations|tensorstore_spill).*", "", str(error), flags=re.DOTALL)
            lasting = isinstance(error, NotImplementedError) or _LASTING.search(str(error))
            kind = AegisError if lasting else Unanswered
            raise kind(f"cannot use {self.place}: {' '.join(reason.split())[:300]}") from error


def open_store(place: str | os.PathLike, *, new: bool = False, mounts: str | None = None) -> Store:
    """The store in a folder or at gs://BUCKET/PATH.

    new: a batch may be begun there; otherwise there must be one. mounts: what /proc/mounts says, by default this
    machine's. Raises `AegisError` for a place that is none, holds something else, or cannot keep a ledger.
    """
    place = str(place)
    if "://" in place:
        if not place.startswith("gs://"):
            raise AegisError(f"{place}: give a folder or gs://BUCKET/PATH, nothing else can keep a ledger")
        return _opened(place.rstrip("/") + "/", place, new)
    path = expand(place).absolute()
    refuse_fuse(path, _mounts() if mounts is None else mounts)
    if path.exists() and not path.is_dir():
        raise AegisError(f"{path} is a file: name a folder")
    if new and path.is_dir():
        names = os.listdir(path)
        if names and not any(name.startswith(PLAN) for name in names):
            raise AegisError(f"{path} exists and holds no batch: name another folder")
    return _opened({"driver": "file", "path": f"{path}/"}, place, new, path)


def _opened(spec, place: str, new: bool, folder: Path | None = None) -> Store:
    try:
        kvstore = tensorstore.KvStore.open(spec).result()
    except ValueError as error:
        raise AegisError(f"{place}: {' '.join(str(error).split())[:300]}") from error
    store = Store(kvstore, place, folder)
    if not new and store.read(PLAN)[0] is None:
        raise AegisError(f"{place} holds no batch: there is no {PLAN}")
    return store


def refuse_fuse(path: Path, mounts: str) -> None:
    """Refuses a folder on a file system in user space that is not known to be sound, as gateways to buckets are not.

    gcsfuse, s3fs and their like create, lock and rename by steps that other machines see, so two workers could both
    find that they were first.
    """
    path, found = path.resolve(), (Path(), "", "")
    for line in mounts.splitlines():
        source, point, kind, *_ = line.split()
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point))
        if path.is_relative_to(point) and len(point.parts) >= len(found[0].parts):
            found = point, kind, source
    point, kind, source = found
    if kind.startswith("fuse") and kind not in _SOUND_FUSE:
        raise AegisError(
            f"{path} lies on {point}, a mount of type {kind} ({source}), which cannot keep a ledger: give the bucket "
            "itself as gs://BUCKET/PATH, or a folder on a disk or network file system with locks"
        )


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return ""
