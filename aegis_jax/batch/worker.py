"""A worker: takes rows of the plan that nobody has, a group at a time, until there is none left to be done.

N of these, the same command on whatever machines, share a ledger (ledger.py) and nothing else. One that is killed
loses the group it was at, which another begins again; one that is started again goes on with what is left.
"""

import contextlib
import dataclasses
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

from aegis_jax.batch.ledger import Ledger
from aegis_jax.batch.plan import Plan, Row
from aegis_jax.batch.store import Unanswered
from aegis_jax.errors import AegisError, SourceGone, Unavailable, is_full_device
from aegis_jax.run.progress import Silent, duration

STRIKES = 3  # groups in a row that end in an error of no kind that is known: then the machine is at fault
SOLITARY = 3  # workers that were lost with a row; from then on it is tried alone
POLL = 5.0  # seconds between two looks at a ledger in which there is nothing to take


class Stopped(KeyboardInterrupt):
    """A signal that asks a worker to end."""

    def __init__(self, signum: int):
        name = signal.Signals(signum).name
        super().__init__(f"{name}: what was not finished is free for others; the same command goes on with it")
        self.signum = signum


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """While entered, the first SIGTERM or SIGINT raises `Stopped`; a second one acts as usual."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}

    def stop(signum, frame):
        for number, handler in before.items():
            signal.signal(number, handler)
        raise Stopped(signum)

    for signum, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@dataclasses.dataclass(frozen=True)
class Result:
    """What an erasure has come to.

    Attributes:
      files: {ending of the name: content}; the first is the result proper.
      record: what is to be told of it beside, for `done`.
    """

    files: dict[str, bytes]
    record: dict


def work(
    plan: Plan,
    ledger: Ledger,
    erase: Callable[[dict[int, Row]], Iterator[tuple[int, Result | AegisError]]],
    width: Callable[[Row], int],
    *,
    progress=None,
    poll: float = POLL,
) -> None:
    """Works until every row is done or has failed for good, whoever did it.

    erase: {lane: row} of one program -> (lane, what it has come to) of each, one at a time; an `AegisError` among these
    is that row's. width: how many lanes a batch of such rows has. progress: as of `run.progress`.

    Raises what keeps this machine from working at all: a full disk or device, a store that no longer answers
    (`Unavailable`), or `STRIKES` unknown errors one after another.
    """
    progress, start, strikes = progress or Silent(), time.monotonic(), 0
    first = len(ledger.survey().done)
    with ledger.renewing(), _may_come_back():
        while True:
            group, left = _pull(plan, ledger, width)
            if group:
                error = _erase(ledger, erase, group, progress)
                strikes = strikes + 1 if isinstance(error, Exception) and not isinstance(error, AegisError) else 0
                if strikes == STRIKES:
                    raise error
                progress.say(_told(plan, ledger, first, time.monotonic() - start))
            elif left:
                time.sleep(poll)
            else:
                return


@contextlib.contextmanager
def _may_come_back() -> Iterator[None]:
    """A store that has answered before, and does not now, is nothing to mend: who starts workers is to try again."""
    try:
        yield
    except Unanswered as error:
        raise Unavailable(f"{error}; what was not finished is free for others; start this again") from error


def _pull(plan: Plan, ledger: Ledger, width: Callable[[Row], int]) -> tuple[dict[int, Row], bool]:
    """({lane: row} of rows that were claimed, whether any row is open).

    First of those that nobody has claimed; when there are none, of those that were let go or lost.
    """
    now = ledger.survey()
    rows = [row for row in plan.from_offset(ledger.worker) if now.is_open(row.id)]
    new = ((row, 0) for row in rows if row.id not in now.claimed)
    group = _claimed(new, now.attempts, lambda row, _: ledger.claim(row.id), width)
    if not group:
        known = ledger.abandoned(row.id for row in rows if row.id in now.claimed)
        lost = ((row, known[row.id]) for row in rows if row.id in known)
        group = _claimed(lost, now.attempts, lambda row, count: ledger.take(row.id, count), width)
    return group, bool(rows)


def _claimed(rows: Iterable[tuple[Row, int]], attempts: dict, claim: Callable, width: Callable) -> dict[int, Row]:
    """{lane: row} of the first rows, each (row, workers lost with it), that can be claimed and go together.

    That is: of one program, each in a lane of its own. A row that has failed, or has been lost too often, goes alone,
    so that it takes no other with it.
    """
    group: dict[int, Row] = {}
    for row, lost in rows:
        lane, alone = row.number % width(row), attempts.get(row.id, 0) > 0 or lost >= SOLITARY
        if group and (alone or lane in group or row.program != next(iter(group.values())).program):
            continue
        if claim(row, lost):
            group[lane] = row
            if alone or len(group) == width(row):
                break
    return group


def _erase(ledger: Ledger, erase: Callable, group: dict[int, Row], progress) -> Exception | None:
    """Erases a group, commits what comes of each and says which have failed; the error that ended all, if one did."""
    left, start, count = dict(group), time.monotonic(), len(group)
    found = erase(group)
    try:
        for lane, result in _each(found):
            row = left.pop(lane)
            if isinstance(result, Exception):
                ledger.fail(row.id, str(result), final=True)
                progress.say(f"{row.name}: {result}")
                continue
            hashes = {end: ledger.keep(f"results/{row.file}{end}", data) for end, data in result.files.items()}
            names = [f"results/{row.file}{end}" for end in hashes]
            record = {"concepts": row.concepts, "result": names[0], "sha256": next(iter(hashes.values()))}
            record |= {"files": names[1:], "seconds": (time.monotonic() - start) / count, **result.record}
            ledger.commit(row.id, record)
    except _Failed as failed:
        error = failed.__cause__
        # In company nobody knows whose it is, and alone one that is not ours may be an accident.
        final = count == 1 and isinstance(error, AegisError)
        for row in left.values():
            ledger.fail(row.id, f"{type(error).__name__}: {error}", final=final)
        if not isinstance(error, AegisError):
            traceback.print_exception(error)
        progress.say(f"{', '.join(row.name for row in left.values())}: {type(error).__name__}: {error}")
        return error.with_traceback(None)  # which would hold all that was on the device
    return None


class _Failed(Exception):
    """Erasing has failed; its cause says how."""


def _each(found: Iterator) -> Iterator:
    """The same; an error in it that is none of this machine's becomes `_Failed`, those of the caller stay."""
    while True:
        try:
            value = next(found, None)
        except Exception as error:
            if is_the_machines(error):
                raise
            raise _Failed from error
        if value is None:
            return
        yield value


def is_the_machines(error: Exception) -> bool:
    """Whether an error is of this machine, whatever is erased: a full or broken disk or device, a base gone."""
    causes = (error, error.__cause__)
    return any(isinstance(x, OSError | MemoryError | SourceGone) or is_full_device(x) for x in causes)


def _told(plan: Plan, ledger: Ledger, before: int, seconds: float) -> str:
    """How far all workers have come, and how fast since this one began."""
    now, total = ledger.survey(), len(plan.rows)
    left = sum(now.is_open(row.id) for row in plan.rows)
    since = len(now.done) - before
    failed = f", {len(now.failed - now.done)} failed" if now.failed - now.done else ""
    rate = f"; {since * 3600 / seconds:.1f} an hour, {duration(left * seconds / since)} left" if since and left else ""
    return f"{len(now.done)} of {total} done{failed}{rate}"
