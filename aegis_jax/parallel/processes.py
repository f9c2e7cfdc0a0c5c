"""Several processes that train one model together: who takes part, what they agree on, and how they end.

Nothing else knows how many there are. Every process runs the same program; what is written, shown or measured is the
first one's. Who fails in a part that all go through says so to all, by JAX's coordination service, so that all end with
the same line. Who fails anywhere else ends, and the others within `HEARTBEAT` seconds (JAX aborts them, exit code 134).
One that neither dies nor goes on is found by `Watchdog` while steps are made, and anywhere else after `LONGEST`.

Taking part, by environment: AEGIS_NUM_PROCESSES, AEGIS_PROCESS_ID and JAX_COORDINATOR_ADDRESS=HOST:PORT (process 0's);
or AEGIS_NUM_PROCESSES=auto where JAX knows the cluster: within srun, on a Cloud TPU slice, in a GKE job.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import re
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from aegis_jax.errors import AGAIN, AegisError, is_full_device

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
LEAVING = 10  # seconds that one which ends waits for the others
LONGEST = 6 * 3600  # seconds that what one does and the others wait for may take: loading, export, pictures
COMING = 300  # seconds that the others have to come
USER, FAILED = 2, 1  # exit codes of the command: what the user can mend, anything else
# What XLA says where a connection is lost, and where one does not answer.
_LOST = re.compile("UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|[Cc]onnection|[Gg]loo|NCCL|[Pp]eer|Broken pipe")
_numbers = itertools.count()  # of the meetings so far; the same in all, since all come to the same ones


class AgreedError(AegisError):
    """What all processes raise together."""


def start() -> None:
    """Joins the others that the environment names, if it names any. Before anything else that asks for a device.

    Raises `AegisError` for a wrong or incomplete environment. If the others do not come within `COMING` seconds this
    process ends with `AGAIN`, since they may at the next attempt: by one line, but for the first one, which JAX aborts.
    """
    asked = _asked()
    if asked is None or jax.distributed.is_initialized():
        return
    if asked.get("process_id"):
        _reach(asked["coordinator_address"])
    limits = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": LEAVING}
    try:
        jax.distributed.initialize(**asked, initialization_timeout=COMING, **limits)
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise AegisError(f"AEGIS_NUM_PROCESSES={os.environ['AEGIS_NUM_PROCESSES']}: {why}") from error


def _reach(address: str) -> None:
    """Waits until process 0 listens: JAX would abort, with no word on what to look at."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # of an IPv6 address, which only JAX takes with them
    until = time.monotonic() + COMING
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            if time.monotonic() > until:
                why = f"process 0 was not reached at JAX_COORDINATOR_ADDRESS={address} for {COMING} s ({error})"
                _leave(f"aegis: error: {why}; check that it runs, and the address", AGAIN)
            time.sleep(0.2)


def _asked() -> dict | None:
    """Arguments of `jax.distributed.initialize`; None where this process is alone."""
    count = os.environ.get("AEGIS_NUM_PROCESSES", "").strip()
    if count in ("", "1"):
        return None
    if count == "auto":
        return {}
    number, address = os.environ.get("AEGIS_PROCESS_ID", "").strip(), os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    numbered = count.isdecimal() and number.isdecimal() and int(number) < int(count)
    port = re.fullmatch(r".+:(\d{1,5})", address, re.ASCII)
    if not (numbered and port and 0 < int(port[1]) < 2**16):
        raise AegisError(
            f"AEGIS_NUM_PROCESSES={count!r}, AEGIS_PROCESS_ID={number!r}, JAX_COORDINATOR_ADDRESS={address!r}; wanted "
            "how many (or auto), which one from 0 on, and HOST:PORT of process 0"
        )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and shows."""
    return jax.process_index() == 0


def agreed(compute: Callable):
    """`compute()` of every process; each keeps its own result.

    Raises `AgreedError` in all of them, naming process and host, where any raised `AegisError` or `OSError`.
    """
    if not several():
        return compute()
    result, failure = _tried(compute)
    said = _exchange({"error": failure})
    _raise_first(enumerate(said))
    return result


def first(compute: Callable):
    """`compute()` in the first process alone; its result, as JSON holds it, or its error, in all."""
    if not several():
        return compute()
    number, client = next(_numbers), _client()
    if is_first():
        result, failure = _tried(compute)
        client.key_value_set(f"aegis/{number}", json.dumps({"value": result, "error": failure}))
    said = json.loads(client.blocking_key_value_get(f"aegis/{number}", LONGEST * 1000))
    _together(number)
    _raise_first([(0, said)])
    return said["value"]


def same(what: str, found: dict) -> None:
    """Raises `AgreedError` in all processes unless `found`, which JSON can hold, is one and the same in each."""
    if not several():
        return
    wanted, *others = [said["found"] for said in _exchange({"found": found})]
    for number, other in enumerate(others, 1):
        different = [key for key in {**wanted, **other} if wanted.get(key) != other.get(key)]
        if different:
            raise AgreedError(f"process {number} has another {what} than process 0: {', '.join(different)}")


@contextlib.contextmanager
def first_holds(make: Callable):
    """Enters the context manager that `make()` gives in the first process, and gives what that gives; None in others.

    They wait until it is entered, and share its error.
    """
    with contextlib.ExitStack() as stack:
        entered = []
        first(lambda: entered.append(stack.enter_context(make())))
        yield entered[0] if entered else None


@contextlib.contextmanager
def ending(*together):
    """Ends this process at once for what it alone fails by: the others wait for it in the middle of a computation.

    together: kinds of errors that all raise after the same step; like `AgreedError` they pass.
    """
    try:
        yield
    except (AgreedError, *together):
        raise
    except Exception as error:
        if not several():
            raise
        why, of_xla = str(error).strip(), isinstance(error, jax.errors.JaxRuntimeError)
        if isinstance(error, AegisError | OSError):
            text, code = f"aegis: error: {' '.join(why.split())}", USER
        elif is_full_device(error):
            text, code = f"aegis: error: the device's memory is full ({why.splitlines()[0]})", USER
        elif of_xla and _LOST.search(why):
            text, code = f"aegis: error: another process has gone ({why.splitlines()[0]}); go on with --resume", AGAIN
        else:
            text, code = traceback.format_exc(), FAILED
        _leave(f"{text} ({_who(jax.process_index(), socket.gethostname())})", code)


def _leave(text: str, code: int) -> None:
    print(text, file=sys.stderr, flush=True)
    os._exit(code)


def on_host(tree):
    """A tree of arrays as NumPy arrays; those that are spread over the processes' devices come whole to each."""
    gathered = [_whole(x) for x in jax.tree.leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), jax.device_get(gathered))


def _whole(x):
    here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return x if here else multihost_utils.process_allgather(x, tiled=True)


def stop_agreed(step: int) -> bool:
    """Whether all shall stop after this step, since one of them was told to (SIGTERM). To be asked after every step."""
    return several() and multihost_utils.reached_preemption_sync_point(step)


class Watchdog:
    """Ends a process whose steps no longer come: a peer that hangs hangs all, and nothing in JAX says so.

    While entered, `beat` is to be called after every step. If none comes for `least` seconds and `factor` times the
    median of the steps so far (before the first: `compiling` seconds), the stacks of all threads go to standard error
    and the process ends with `AGAIN`; the others follow within `HEARTBEAT` seconds. Does nothing for a single process.
    """

    def __init__(self, *, least: float = 900.0, factor: float = 20.0, compiling: float = 3600.0):
        self._least, self._factor, self._compiling = least, factor, compiling
        self._steps: list[float] = []
        self._last = time.monotonic()
        self._done = threading.Event()

    def __enter__(self):
        self._last = time.monotonic()
        if several():
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._done.set()

    def beat(self) -> None:
        now = time.monotonic()
        self._steps = [*self._steps[-100:], now - self._last]
        self._last = now

    @property
    def patience(self) -> float:
        """Seconds."""
        if not self._steps:
            return self._compiling
        return max(self._least, self._factor * statistics.median(self._steps))

    def _watch(self) -> None:
        while not self._done.wait(min(10.0, self._least / 4)):
            waited = time.monotonic() - self._last
            if waited > self.patience:
                text = f"aegis: error: no step for {waited:.0f} s: a process hangs; all end, go on with --resume"
                faulthandler.dump_traceback(all_threads=True)
                _leave(f"{text} ({_who(jax.process_index(), socket.gethostname())})", AGAIN)


def _client():
    from jax._src import distributed  # the only way to the service that JAX itself agrees by

    return distributed.global_state.client


def _tried(compute):
    """(its result, None) or (None, [what went wrong, host])."""
    try:
        return compute(), None
    except (AegisError, OSError) as error:
        return None, [" ".join(str(error).split()), socket.gethostname()]


def _exchange(mine: dict) -> list[dict]:
    """What each process says, in their order."""
    number, client = next(_numbers), _client()
    client.key_value_set(f"aegis/{number}/{jax.process_index()}", json.dumps(mine))
    keys = [f"aegis/{number}/{k}" for k in range(jax.process_count())]
    said = [json.loads(client.blocking_key_value_get(key, LONGEST * 1000)) for key in keys]
    _together(number)
    return said


def _together(number: int) -> None:
    """Waits until all have read: the first one, with which the service ends, may be about to fail."""
    _client().wait_at_barrier(f"aegis/{number}", LONGEST * 1000)


def _raise_first(said) -> None:
    for number, verdict in said:
        if verdict["error"]:
            text, host = verdict["error"]
            raise AgreedError(f"{text} ({_who(number, host)})")


def _who(number: int, host: str) -> str:
    return f"process {number} on {host}"
