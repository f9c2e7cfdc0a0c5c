"""A folder that appears under its name only when it is complete, whatever stops the writing; what may be replaced."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from aegis_jax.errors import AegisError
from aegis_jax.io import hub, safetensors


@contextlib.contextmanager
def new_folder(
    folder: str | os.PathLike, *, overwrite: bool, needed: int, source: pathlib.Path | None = None
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A folder to write a pipeline of about `needed` bytes into, and the place it is renamed to on success.

    source: the folder of the model that it is made of; that itself may be replaced. Raises `AegisError` as
    `save_pipeline` does, which uses it.
    """
    destination = _checked_destination(folder, overwrite)
    if source is not None and destination in source.resolve().parents:  # it would go with what is replaced
        raise AegisError(
            f"the model {source} lies inside {destination}, which would be replaced: choose another folder"
        )
    remove_leftovers(destination)
    _check_space(needed, destination)
    with _written_beside(destination, overwrite) as unfinished:
        yield unfinished, destination


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[None]:
    """While a file is written by `safetensors.write`: its folder is there, and SIGTERM leaves nothing of it.

    Raises `AegisError` where there can be no such folder, and `Stopped`.
    """
    with safetensors.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _stopped_by_sigterm(path):
        yield


def checked_file(path: str | os.PathLike, overwrite: bool, kind: str, example: str, read: Callable) -> pathlib.Path:
    """Where a safetensors file shall go, expanded. Raises `AegisError` for a folder, for a name that is refused when it
    is read, and for what may not be replaced.

    kind: what it is; example: a name for it; read: raises `AegisError` for a file that is none.
    """
    path = hub.expand(path)
    if path.is_dir():
        raise AegisError(f"{path} is a folder: name a file, e.g. {path / example}")
    if path.suffix in hub.PICKLES:
        raise AegisError(f"{path} has a pickle's suffix and would be refused as one: name it {path.stem}.safetensors")
    if path.exists():
        if not overwrite:
            raise AegisError(f"{path} exists: choose another file or allow overwriting it")
        try:
            read(path)
        except AegisError:  # an unlucky argument must not cost a model
            raise AegisError(f"{path} is no {kind}, so it is not overwritten: choose another") from None
    return path


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


def _check_space(needed: int, destination: pathlib.Path) -> None:
    """Refuses at once what cannot fit; the writer itself notices whatever this misses."""
    existing = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise AegisError(
            f"no space left for {destination}: about {needed / 1e9:.2f} GB are needed, "
            f"{free / 1e9:.2f} GB are free; free some space or choose another folder"
        )


class Stopped(KeyboardInterrupt):
    """SIGTERM arrived while a pipeline or a file was written: nothing was kept of it, or if it stood in its place all
    of it."""

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
    """What a folder or a file keeps when it is renamed; None where there is none."""
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
def _written_beside(destination: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """A new folder beside the destination, renamed to it on success and removed otherwise."""
    unfinished, replaced = _beside(destination, "unfinished"), _beside(destination, "replaced")
    with safetensors.writing(destination), _stopped_by_sigterm(destination):
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            try:
                _checked_destination(destination, overwrite)  # again: it took a while
                if overwrite and destination.exists():
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
