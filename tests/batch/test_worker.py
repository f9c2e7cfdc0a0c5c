"""Workers that share a ledger: whatever becomes of them, every row is done once, with the same bytes."""

import collections
import errno
import hashlib
import json
import os
import random
import signal
import threading
import time
import tracemalloc

import pytest

from aegis_jax.batch import worker as worker_lib
from aegis_jax.batch.ledger import ATTEMPTS, LOST, Ledger, records
from aegis_jax.batch.store import Store, Unanswered, open_store
from aegis_jax.batch.worker import Result, stoppable, work
from aegis_jax.errors import AegisError
from tests.batch import racing


@pytest.fixture
def ledger():
    """ledger(name, **options): a view of this test's own, in memory."""
    store = racing.store()
    return lambda name, **options: Ledger(store, name, **options)


def results(folder):
    store = open_store(folder)  # which passes over what a write that was killed has left
    return {name: store.read(f"results/{name}")[0] for name in store.names("results")}


def run(plan, ledger, erase, width=racing.WIDTH):
    ledger.keep_plan(plan)
    work(plan, ledger, erase, lambda row: width, poll=0.01)


def test_four_workers_killed_at_fifty_moments(tmp_path):
    """Every concept is done exactly once, and the results are those of a worker that nobody disturbed."""
    count, context, out = 60, racing.processes(), tmp_path / "out"
    start = random.Random(7)

    def started(name):
        arguments = (str(out), name, count, 0.1, 0.8)
        process = context.Process(target=racing.worker, args=arguments, daemon=True)
        process.start()
        return process

    running, kills = [started(f"first {k}") for k in range(4)], 0
    while kills < 50:
        time.sleep(start.uniform(0.0, 0.15))
        k = start.randrange(4)
        if running[k].exitcode is None:  # else it has found all done, or is about to be
            running[k].kill()
            kills += 1
        running[k].join()
        running[k] = started(f"again {kills}")
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    plan = racing.plan(count)
    done = open_store(out)
    told = [json.loads(done.read(f"done/{name}")[0]) for name in done.names("done")]
    assert collections.Counter(tuple(record["concepts"]) for record in told) == {row.concepts: 1 for row in plan.rows}
    assert not done.names("failed") and not done.names("attempts")
    # Some were killed while they had rows, which others have taken over.
    assert any(claim["lost"] for claim in records(done, "claims", (row.id for row in plan.rows)).values())
    run(plan, Ledger(open_store(tmp_path / "calm", new=True), "calm"), racing.erase(0))
    assert results(out) == results(tmp_path / "calm")
    for record in told:
        assert record["sha256"] in {hashlib.sha256(x).hexdigest() for x in results(out).values()}


def test_six_race_for_two_hundred_keys(tmp_path):
    context = racing.processes()
    barrier, won = context.Barrier(6), context.Queue()
    racers = [
        context.Process(target=racing.race, args=(str(tmp_path / "out"), f"racer {k}", 200, barrier, won), daemon=True)
        for k in range(6)
    ]
    for racer in racers:
        racer.start()
    keys = [key for _ in racers for key in won.get(timeout=120)]
    assert len(keys) == len(set(keys)) == 200


def test_a_group_is_of_one_program_and_each_row_in_its_lane(ledger):
    """As many as fit, whatever their order in the plan, and lanes that do not depend on the company."""
    groups = []

    def erase(group):
        groups.append({lane: row.name for lane, row in group.items()})
        for lane in group:
            yield lane, Result({".safetensors": b""}, {})

    asked = [(("a",), {}, None), (("b",), {"steps": 2}, None), (("c", "of"), {}, None)]
    asked += [((name,), {}, None) for name in "defg"]
    plan = racing.plan_lib.make("model", "hash", asked)
    mine = ledger("somebody")
    mine.keep_plan(plan)
    assert mine.claim(plan.rows[3].id)  # "d" is another's
    rest = ledger("somebody else")
    # Begins with the first row, for a name whose offset is 0.
    rest.worker = next(name for name in map(str, range(99)) if plan.from_offset(name)[0].name == "a")
    thread = threading.Timer(0.2, lambda: mine.commit(plan.rows[3].id, {}))
    thread.start()
    run(plan, rest, erase, width=3)
    # Of the settings {} and one concept there are a, d, e, f, g, in lanes 0, 1, 2, 0, 1.
    assert groups == [{0: "a", 2: "e", 1: "g"}, {0: "b"}, {0: "c"}, {0: "f"}]


@pytest.mark.parametrize(("error", "attempts"), [(RuntimeError, ATTEMPTS), (AegisError, 2)])
def test_a_row_that_fails_is_told_and_blocks_no_other(ledger, error, attempts):
    """One whose loss goes bad is given up at once; one with which all of a group failed is tried again, alone: three
    times in all, or until what it says is an error of its own.
    """
    tried = []

    def erase(group):
        names = [row.name for row in group.values()]
        tried.append(names)
        if "concept 1" in names:
            raise error("the  machine\nhiccuped")
        for lane, row in group.items():
            bad = row.name == "concept 4"
            yield lane, AegisError("step 3: L_e is not finite") if bad else Result({".safetensors": b"x"}, {})

    plan = racing.plan(6)
    mine = ledger("only")
    run(plan, mine, erase)
    now = mine.survey()
    assert {row.name for row in plan.rows if row.id in now.done} == {f"concept {k}" for k in (0, 2, 3, 5)}
    assert {row.name for row in plan.rows if row.id in now.failed} == {"concept 1", "concept 4"}
    one, four = (records(mine.store, "failed", now.failed)[plan.rows[k].id] for k in (1, 4))
    assert (one["reason"], one["attempt"]) == (f"{error.__name__}: the machine hiccuped", attempts)
    assert (four["reason"], four["attempt"]) == ("step 3: L_e is not finite", 1)
    with_one = [names for names in tried if "concept 1" in names]
    assert len(with_one) == attempts and with_one[1:] == [["concept 1"]] * (attempts - 1)


def test_a_broken_machine_stops_and_uses_up_no_attempts(ledger):
    def full(group):
        raise AegisError("no space left") from OSError(28, "no space")
        yield

    def full_device(group):
        raise AegisError("memory is full") from RuntimeError("INTERNAL: x: Out of memory allocating 9 bytes.")
        yield

    def broken(group):
        raise RuntimeError("no such kernel")
        yield

    plan, mine = racing.plan(40), ledger("only")
    with pytest.raises(AegisError, match="no space left"):
        run(plan, mine, full)
    with pytest.raises(AegisError, match="memory is full"):
        run(plan, mine, full_device)
    assert not mine.survey().attempts
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(plan, mine, broken)
    now = mine.survey()
    assert len(now.attempts) == racing.WIDTH * worker_lib.STRIKES and not now.failed
    run(plan, ledger("sound"), racing.erase(0))  # all claims were let go
    assert len(mine.survey().done) == 40


@pytest.mark.parametrize("folder", ["attempts", "results"])
def test_a_store_that_falls_silent_is_nothing_to_mend(ledger, monkeypatch, folder):
    """Whether it is asked what there is or given a result: no attempt is lost, and the exit code says: try again."""
    plan, mine = racing.plan(6), ledger("only")
    log = []

    def silent(ask):
        def asked(self, key, *rest):
            if log and key.startswith(folder):
                self._asked(Gone())
            return ask(self, key, *rest)

        return asked

    class Gone:
        def result(self):
            raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(AegisError, match="Stale file handle.*start this again") as lost:
        patch.setattr(Store, "names", silent(Store.names))
        patch.setattr(Store, "create", silent(Store.create))
        run(plan, mine, racing.erase(0, log))
    assert lost.value.code == 134
    run(plan, ledger("next"), racing.erase(0))
    assert len(mine.survey().done) == 6 and not mine.survey().attempts


def test_what_a_killed_writer_left_is_no_part_of_the_next_value(tmp_path):
    store = open_store(tmp_path / "out", new=True)
    for key in ("claims/a.json", "done/a.json"):
        left = tmp_path / "out" / f"{key}.__lock"  # tensorstore's: it is renamed when all is written
        left.parent.mkdir(parents=True)
        left.write_bytes(b"x" * 1000)
    assert Ledger(store, "one").claim("a") and Ledger(store, "one").commit("a", {"result": "r"})
    for key in ("claims/a.json", "done/a.json"):
        value = (tmp_path / "out" / key).read_bytes()
        assert json.loads(value) and value == store.read(key)[0] and b"x" not in value
    assert store.create("done/a.json", b"other") is None
    (tmp_path / "out" / "done" / "b.json").write_bytes(b'{"result": "r"}\nxxx')  # seen before it is mended
    assert records(store, "done", ["b"]) == {"b": {"result": "r"}}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_another_attempt_would_find_again_is_to_be_mended(ledger, number):
    store = ledger("only").store

    class Refused:
        def result(self):
            raise ValueError(f"Failed to write [os_error_code='{number}'] [source locations='x']")

    with pytest.raises(AegisError, match="cannot use") as refused:
        store._asked(Refused())
    assert refused.value.code == 2 and not isinstance(refused.value, Unanswered)


def test_one_that_takes_its_workers_with_it_is_given_up(ledger):
    """As where a machine's memory is too small: somebody says so in the end, and nobody goes on for ever."""
    plan, clock = racing.plan(2), [0.0]
    ledger("first").keep_plan(plan)
    victim = plan.rows[0].id
    for k in range(LOST):
        mine = ledger(f"lost {k}", clock=lambda: clock[0], lease=10)
        if k == 0:
            assert mine.claim(victim)
            continue
        assert mine.abandoned([victim]) == {}
        clock[0] += 11
        assert mine.abandoned([victim]) == {victim: k} and mine.take(victim, k)
    last = ledger("last", clock=lambda: clock[0])
    last.abandoned([victim])
    clock[0] += 11
    assert not last.take(victim, last.abandoned([victim])[victim])
    run(plan, last, racing.erase(0))
    assert last.survey().failed == {victim} and last.survey().done == {plan.rows[1].id}


def test_sigterm_frees_the_claims(ledger):
    """In the command: the exit code is 128 + 15, and nobody has to wait for a lease."""
    plan = racing.plan(3)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as stopped, stoppable():
        run(plan, ledger("mine", lease=1000), racing.erase(60))
    assert stopped.value.signum == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    log = []
    run(plan, ledger("next"), racing.erase(0, log))
    assert sorted(log) == [row.name for row in plan.rows]


def test_a_thousand_take_the_memory_of_ten(monkeypatch):
    """Each result goes before the next comes: what grows with the plan is its rows alone."""
    size = 1 << 20

    def peak(count):
        plan, kept = racing.plan(count), []
        mine = Ledger(racing.store(), "only")
        monkeypatch.setattr(mine, "keep", lambda key, data: kept.append(key) or "")  # the disk is not the question

        def erase(group):
            for lane in group:
                yield lane, Result({".safetensors": bytes(size)}, {})

        tracemalloc.start()
        run(plan, mine, erase, width=50)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(kept) == count
        return found

    few, many = peak(10), peak(1000)
    assert few >= size and many < few + 5 * size  # a thousand results would be 1000 * size
