"""Who does what, what is done and what has failed, in a store that all workers share and no server keeps.

  plan.jsonl          what is to be done (plan.py); created once
  claims/ID.json      who works on a row: created by the first; then swapped, by its owner to renew and to release it,
                      by another once it has seen the same generation for longer than the lease on its own clock
  results/NAME.*      what an erasure has come to; created once
  done/ID.json        that a row is done, with its result's name and sha256; created once
  attempts/ID.N.json  that its Nth attempt failed, and why; created once
  failed/ID.json      that it is given up: the last attempt and why it failed; created once

That a row counts once rests on done/ID.json alone: whoever creates it has done the row, and who comes second discards
what it has. A claim only saves work; two workers that hold one, by whatever accident, come to the same result.
"""

import contextlib
import dataclasses
import hashlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from aegis_jax.batch import plan as plan_lib
from aegis_jax.batch.store import PLAN, Store
from aegis_jax.errors import AegisError

ATTEMPTS = 3  # of a row, before it counts as failed
LOST = 10  # workers that end without a word while they have a row, before it counts as failed
LEASE = 120.0  # seconds without a sign of life before another takes a claim; renewed four times in that time


@dataclasses.dataclass(frozen=True)
class Survey:
    """Ids of rows as a ledger has them at a moment: `attempts` of those that have failed so far, and how often."""

    done: set[str]
    failed: set[str]
    claimed: set[str]
    attempts: dict[str, int]

    def is_open(self, row: str) -> bool:
        return row not in self.done and row not in self.failed


@dataclasses.dataclass
class _Held:
    """A claim of this worker: its generation, and how many have lost the row before."""

    generation: bytes
    lost: int


class Ledger:
    """A worker's view of a ledger.

    worker: a name that no other has. lease: seconds; it stands in the claims, so that all wait for each as long as its
    owner asked. clock: seconds that only ever rise.
    """

    def __init__(self, store: Store, worker: str, *, lease: float = LEASE, clock: Callable = time.monotonic):
        self.store, self.worker, self.lease = store, worker, lease
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}  # of others' claims: generation, and since when it is that
        self._lock = threading.Lock()

    def keep_plan(self, plan: plan_lib.Plan) -> None:
        """Writes the plan down, or makes sure that it is the one that was. Raises `AegisError` if it is another."""
        text = plan.text().encode()
        if self.store.create(PLAN, text) is not None:
            return
        kept = self.store.read(PLAN)[0]
        if kept != text:
            where = f"{self.store.place}/{PLAN}"
            plan_lib.refuse_other(plan_lib.parse(kept.decode(errors="replace"), where), plan, self.store.place)

    def survey(self) -> Survey:
        return survey(self.store)

    def claim(self, row: str) -> bool:
        """Claims a row that nobody has claimed; False if somebody has."""
        with _uninterrupted():
            generation = self.store.create(f"claims/{row}.json", self._claim("held", 0))
            if generation is not None:
                with self._lock:
                    self._held[row] = _Held(generation, 0)
        return generation is not None

    def abandoned(self, rows: Iterable[str]) -> dict[str, int]:
        """{row: how many workers have been lost with it} of claimed rows that were let go, or whose owner is silent.

        To be asked again and again: a claim counts as silent once this worker has seen it unchanged for its lease.
        """
        rows = [row for row in rows if row not in self._held]
        found, now = {}, self._clock()
        for row, (value, generation) in zip(rows, self.store.read_all(f"claims/{row}.json" for row in rows)):
            if value is None:
                continue
            claim = said_in(value)
            seen = self._seen.get(row)
            if seen is None or seen[0] != generation:
                self._seen[row] = seen = generation, now
            if claim["state"] == "free":
                found[row] = claim["lost"]
            elif now - seen[1] > claim["lease"]:
                found[row] = claim["lost"] + 1
        return found

    def take(self, row: str, lost: int) -> bool:
        """Claims a row that `abandoned` gave; False if another was faster or the owner has come back."""
        with _uninterrupted():
            generation = self.store.swap(f"claims/{row}.json", self._claim("held", lost), self._seen[row][0])
            if generation is None:
                return False
            with self._lock:
                self._held[row] = _Held(generation, lost)
        if self.store.read(f"done/{row}.json")[0] is not None:  # since the ledger was looked at
            self._forget(row)
            return False
        if lost >= LOST:
            self.fail(row, f"{lost} workers have ended without a word while they had it", final=True)
            return False
        return True

    def keep(self, key: str, content: bytes) -> str:
        """Writes a result; its sha256, or that of the one which lies there.

        That is of a worker that was lost before it said that it was done, or is as late as this one.
        """
        if self.store.create(key, content) is None:
            content = self.store.read(key)[0]
        return hashlib.sha256(content).hexdigest()

    def commit(self, row: str, record: dict) -> bool:
        """Says that a row is done; False if another has."""
        made = self.store.create(f"done/{row}.json", _json({**record, "worker": self.worker}))
        self._forget(row)
        return made is not None

    def fail(self, row: str, reason: str, *, final: bool) -> None:
        """Says that an attempt at a row has failed. final: another would too, so it is the last."""
        said = {"reason": " ".join(reason.split()), "worker": self.worker}
        attempt = 1
        while attempt < ATTEMPTS:
            key = f"attempts/{row}.{attempt}.json"
            if not final and self.store.create(key, _json({"attempt": attempt, **said})) is not None:
                with _uninterrupted():
                    self._let_go(row)
                return
            if final and self.store.read(key)[0] is None:
                break
            attempt += 1
        self.store.create(f"failed/{row}.json", _json({"attempt": attempt, **said}))
        self._forget(row)

    @contextlib.contextmanager
    def renewing(self):
        """While entered, claims are renewed; on leaving, however, they are released."""
        stop = threading.Event()
        thread = threading.Thread(target=self._renew, args=(stop,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(5)  # seconds; a store that does not answer must not keep the worker
            with contextlib.suppress(AegisError):  # else the leases end by themselves
                self.release()

    def renew(self) -> None:
        """Renews the claims; one that another has taken is lost, and what it comes to is committed or discarded."""
        for row in list(self._held):
            held = self._held.get(row)
            if held is None:
                continue
            # Not within the lock: a store that is slow must not keep the worker from what it does meanwhile.
            generation = self.store.swap(f"claims/{row}.json", self._claim("held", held.lost), held.generation)
            with self._lock:
                here = self._held.get(row) is held
                if here and generation is None:
                    del self._held[row]
                elif here:
                    held.generation = generation
            if not here and generation is not None:  # let go meanwhile, of which this renewal knew nothing
                self.store.swap(f"claims/{row}.json", self._claim("free", held.lost), generation)

    def release(self) -> None:
        """Lets all claims go: others may take them at once."""
        for row in list(self._held):
            self._let_go(row)

    def _let_go(self, row: str) -> None:
        with self._lock:
            held = self._held.pop(row, None)
        if held is not None:
            self.store.swap(f"claims/{row}.json", self._claim("free", held.lost), held.generation)

    def _forget(self, row: str) -> None:
        with self._lock:
            self._held.pop(row, None)

    def _renew(self, stop: threading.Event) -> None:
        while not stop.wait(self.lease / 4):
            with contextlib.suppress(AegisError):  # the store may answer again before the lease is over
                self.renew()

    def _claim(self, state: str, lost: int) -> bytes:
        # The time is for people; nobody compares clocks. It makes every value another, too.
        said = {"worker": self.worker, "state": state, "lease": self.lease, "lost": lost, "time": time.time()}
        return _json(said)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """While entered, a SIGTERM or SIGINT waits, so that a claim which is there is known to be; a second one does not.

    A store may be slow: a signal comes more likely while it is asked than at any other time.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are that one's
        yield
        return
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    handlers = {signum: handler for signum, handler in handlers.items() if handler is not None}  # None: not Python's
    came: list[int] = []

    def as_before():
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def wait(signum, frame):
        came.append(signum)
        as_before()

    try:
        for signum in handlers:
            signal.signal(signum, wait)
        yield
    finally:
        as_before()
        if came and not isinstance(sys.exception(), KeyboardInterrupt):  # which a second one has raised
            signal.raise_signal(came[0])


def survey(store: Store) -> Survey:
    attempts: dict[str, int] = {}
    for name in store.names("attempts"):
        row = name.partition(".")[0]
        attempts[row] = attempts.get(row, 0) + 1
    # What is open is looked for last, so that nothing that has just been done or claimed is taken for free.
    claimed, failed, done = (
        {name.removesuffix(".json") for name in store.names(kind)} for kind in ("claims", "failed", "done")
    )
    return Survey(done, failed, claimed, attempts)


def records(store: Store, kind: str, rows: Iterable[str]) -> dict[str, dict]:
    """{row: what the ledger says of it} of a kind, e.g. done, of those rows that have such a record."""
    rows = list(rows)
    found = zip(rows, store.read_all(f"{kind}/{row}.json" for row in rows))
    return {row: said_in(value) for row, (value, _) in found if value is not None}


def said_in(value: bytes) -> dict:
    """What a value of `_json` says; what another has left behind it (`Store.swap`) is no part of it."""
    return json.loads(value.partition(b"\n")[0])


def _json(said: dict) -> bytes:
    return (json.dumps(said, ensure_ascii=False) + "\n").encode()
