"""Who works in a folder: one process at a time, by a lock file that names it and that it renews."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from aegis_jax.errors import AGAIN, AegisError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "run.lock"
RENEWED = 15.0  # seconds between two renewals of a lock
SILENT = 60.0  # seconds without one after which its holder counts as gone


@contextlib.contextmanager
def claimed(folder: Path):
    """Makes `folder` and holds it for this process while entered; what it made goes again if nothing came into it.

    The lock file is locked (flock) all the while, so one of this host that is not is of a process that is gone,
    whichever container it ran in, and is taken over. Where the file system has no such locks, so is that of a process
    of this host that no longer lives. Raises `AegisError` naming host and process where one lives, or may: of another
    host that cannot be told, since network file systems may keep such locks on each by itself.
    """
    new = []
    for path in (folder, *folder.parents):
        with contextlib.suppress(FileNotFoundError):
            path.stat()
            break
        new.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with one_at_a_time(folder):  # of two that find a stale lock one takes it over
            file = _take(folder / LOCK)
        with file:
            done = threading.Event()
            threading.Thread(target=_renew, args=(folder / LOCK, file, done), name="claim", daemon=True).start()
            try:
                yield
            finally:
                done.set()
                if fcntl is None or _is_at(file, folder / LOCK):  # else it is of one that has taken over
                    (folder / LOCK).unlink(missing_ok=True)  # still locked: who waits for it sees that it is gone
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in new:
                path.rmdir()


def take_over(folder: Path, say=print) -> None:
    """Removes the lock of a process of another host that does not renew it for `SILENT` seconds, seen from here.

    Hosts' clocks are not compared. One that renews it keeps it, and so does one of this host: `claimed` tells whether
    that lives. say: is told that it takes a while.
    """
    lock = folder / LOCK
    first = _state(lock)
    if first is None or _host(lock) == socket.gethostname():
        return
    say(f"{folder} was held by {_told(lock)}: looking for {SILENT:.0f} s whether it still works there")
    until = time.monotonic() + SILENT
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT / 10))
        if _state(lock) != first:
            return
    with one_at_a_time(folder):
        if _state(lock) == first:
            lock.unlink(missing_ok=True)


def _state(lock: Path):
    """What changes when a lock is renewed or another's; None where there is none."""
    try:
        with open(
            lock, "rb"
        ) as file:  # opened anew, since a network file system may keep what `stat` says for a minute
            found = os.fstat(file.fileno())
            return found.st_ino, found.st_mtime_ns, file.read()
    except FileNotFoundError:
        return None


def _renew(lock: Path, file, done: threading.Event) -> None:
    """Renews a lock until `done`; ends this process if another has taken it over, which two would spoil."""
    while not done.wait(RENEWED):
        with contextlib.suppress(OSError):  # the file system may answer again, and then say that another has taken over
            if fcntl is not None and not _is_at(file, lock):
                if not done.is_set():
                    text = f"aegis: error: {lock.parent} was taken over by {_told(lock)}, so this process ends"
                    print(text, file=sys.stderr, flush=True)
                    os._exit(AGAIN)
                return
            os.utime(lock)


def _take(lock: Path):
    """The lock file, with this process in it; locked until it is closed."""
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
    while True:
        file, new = _opened(lock)
        try:
            locked = _locked(file, lock)
            if not new and not (locked and _host(lock) in (None, mine["host"])):
                _check_stale(lock, mine["host"])
            if not _is_at(file, lock):  # its holder has removed it since it was opened
                file.close()
                continue
            _write(file, mine, lock)
            return file
        except BaseException:
            file.close()
            raise


def _opened(lock: Path):
    """(the file, whether it is new); what it says stays."""
    try:
        return open(lock, "x", encoding="utf-8"), True
    except FileExistsError:
        return open(lock, "a", encoding="utf-8"), False


def _locked(file, lock: Path) -> bool:
    """Locks the file; False where there are no such locks. Raises `AegisError` if another has it locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AegisError(f"{lock.parent} is in use by {_told(lock)}: wait for it, or name another") from None
    except OSError:
        return False
    return True


def _told(lock: Path) -> str:
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        host, here = holder["host"], socket.gethostname()
        return f"process {holder['pid']} on " + (f"this host, {here}" if host == here else f"host {host}")
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _host(lock: Path) -> str | None:
    """That of the lock's holder; None where it does not say."""
    try:
        return json.loads(lock.read_text(encoding="utf-8"))["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_at(file, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False


def _write(file, mine: dict, lock: Path) -> None:
    try:
        file.truncate(0)
        json.dump(mine, file)
        file.flush()
    except OSError:  # a full disk
        lock.unlink()
        raise
    if fcntl is None:
        file.close()  # Windows removes no open file


def _check_stale(lock: Path, host: str) -> None:
    """Returns if the holder of `lock` lived on this host and is gone."""
    remedy = f"if it is over, remove {lock}"
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        owner, pid, born = holder["host"], int(holder["pid"]), holder["born"]
    except (OSError, ValueError, KeyError, TypeError):
        raise AegisError(f"{lock.parent} is in use by a process that cannot be told; {remedy}") from None
    if owner != host:
        raise AegisError(f"{lock.parent} is in use by process {pid} on host {owner} (this is {host}); {remedy}")
    if _lives(pid, born):
        raise AegisError(f"{lock.parent} is in use by process {pid} on this host, {host}: wait for it, or name another")


def _lives(pid: int, born: str | None) -> bool:
    if Path("/proc/self/stat").exists():
        return _born(pid) is not None and born in (None, _born(pid))
    if os.name != "posix":
        return True  # there signal 0 is no mere question
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _born(pid: int) -> str | None:
    """When a process began, in ticks since its host did; None of one that is gone, and where there is no Linux.

    Numbers are given anew: in a container that is started again even the same command gets the same one.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]


@contextlib.contextmanager
def one_at_a_time(folder: Path):
    """Waits until no other process of this host is in here for the same folder, which exists: for moments, not work.

    Where the system or the file system has no such locks, and between hosts, nobody waits.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def first_alone(folder: Path):
    """The first process of this host to come here works alone; those that come meanwhile wait, then all go on at once.

    folder: exists. Where the system or the file system has no such locks, and between hosts, nobody waits.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without such locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
