"""Claims, leases and commits, one call at a time."""

import json
import signal
import threading

import pytest

from aegis_jax.batch import plan as plan_lib
from aegis_jax.batch.ledger import ATTEMPTS, Ledger, records
from aegis_jax.batch.worker import Stopped, stoppable
from aegis_jax.errors import AegisError
from tests.batch import racing


@pytest.fixture
def store():
    return racing.store()


@pytest.fixture
def ledger(store):
    """ledger(name): a view of one ledger, with a lease of 10 seconds and a clock of its own, `clock`, to be turned."""

    def make(name):
        clock = [100.0 * len(name)]  # nobody's clock is another's
        made = Ledger(store, name, lease=10, clock=lambda: clock[0])
        made.clock = clock
        return made

    return make


def test_a_claim_is_the_first_ones(ledger):
    one, other = ledger("one"), ledger("other")
    assert one.claim("a") and not other.claim("a") and not one.claim("a")
    assert other.claim("b") and one.survey().claimed == {"a", "b"}


def test_a_lease_is_over_when_nothing_has_changed_for_as_long(ledger):
    owner, other = ledger("owner"), ledger("another")
    assert owner.claim("a")
    assert other.abandoned(["a"]) == {}  # it has seen it only now, whenever it was made
    other.clock[0] += 9
    owner.renew()
    other.clock[0] += 9
    assert other.abandoned(["a"]) == {}  # seen anew
    other.clock[0] += 9
    assert other.abandoned(["a"]) == {}
    other.clock[0] += 2
    assert other.abandoned(["a"]) == {"a": 1}
    assert other.take("a", 1)
    owner.renew()  # finds that it has lost it, and says nothing more
    third = ledger("the third")
    third.abandoned(["a"])
    third.clock[0] += 11
    other.renew()
    assert third.abandoned(["a"]) == {}  # the new owner is alive


def test_a_stale_claim_is_not_swapped(ledger, store):
    """Of two that see a lease end one takes it; an owner that renews in between keeps it."""
    owner, one, other = ledger("owner"), ledger("one"), ledger("other")
    owner.claim("a")
    for each in (one, other):
        each.abandoned(["a"])
        each.clock[0] += 11
        assert each.abandoned(["a"]) == {"a": 1}
    assert one.take("a", 1) and not other.take("a", 1)
    owner.claim("b")
    one.abandoned(["b"])
    one.clock[0] += 11
    assert one.abandoned(["b"]) == {"b": 1}
    owner.renew()
    assert not one.take("b", 1)
    absent = store.swap("x", b"1", b"no generation of anything")
    assert absent is None and store.read("x") == (None, b"")


def test_what_is_let_go_is_anybodys_at_once(ledger, store):
    one, other = ledger("one"), ledger("other")
    with one.renewing():
        one.claim("a")
        assert other.abandoned(["a"]) == {}
    assert other.abandoned(["a"]) == {"a": 0} and other.take("a", 0)
    one.release()  # not its own any more
    assert records(store, "claims", ["a"])["a"] | {"time": 0} == {
        "worker": "other", "state": "held", "lease": 10, "lost": 0, "time": 0,
    }  # fmt: skip


def test_the_second_to_finish_discards_what_it_has(ledger, store):
    """Also where the first has written its result and was killed before it could say so."""
    one, other = ledger("one"), ledger("other")
    one.claim("a")
    first = one.keep("results/a", b"first")
    assert other.keep("results/a", b"second") == first and store.read("results/a")[0] == b"first"
    assert other.commit("a", {"sha256": first}) and not one.commit("a", {"sha256": "another"})
    done = records(store, "done", ["a"])["a"]
    assert (done["sha256"], done["worker"]) == (first, "other")
    assert one.survey().done == {"a"}


def test_what_was_done_meanwhile_is_not_taken(ledger):
    owner, late = ledger("owner"), ledger("late")
    owner.claim("a")
    late.abandoned(["a"])
    late.clock[0] += 11
    assert late.abandoned(["a"]) == {"a": 1}
    owner.commit("a", {})
    assert not late.take("a", 1)


def test_attempts_are_counted_over_all_workers(ledger, store):
    for number in range(1, ATTEMPTS):
        each = ledger("w" * number)
        assert each.claim("a") if number == 1 else each.abandoned(["a"]) == {"a": 0} and each.take("a", 0)
        each.fail("a", "no\n  luck", final=False)
        assert each.survey().attempts == {"a": number} and each.survey().is_open("a")
    last = ledger("last")
    last.fail("a", "no luck", final=False)
    now = last.survey()
    assert now.failed == {"a"} and not now.is_open("a")
    assert records(store, "failed", ["a"])["a"] == {"attempt": ATTEMPTS, "reason": "no luck", "worker": "last"}


def asked(*rows, **settings):
    return [((name,), {"steps": 1, **settings}, None) for name in rows]


def test_a_plan_is_kept_and_no_other_taken(ledger, store):
    plan = plan_lib.make("sd14", "abc", asked("star", "red"))
    ledger("one").keep_plan(plan)
    ledger("two").keep_plan(plan_lib.make("sd14", "abc", asked("star", "red")))
    others = {
        "another plan, of 2 rows ('blue' not among them)": plan_lib.make("sd14", "abc", asked("star", "red", "blue")),
        "another plan, of 2 rows": plan_lib.make("sd14", "abc", asked("star")),
        "the same base under another name (sd14, here sd-1.4)": plan_lib.make("sd-1.4", "abc", asked("star", "red")),
        "another base model (sd14)": plan_lib.make("sd21", "abd", asked("star", "red")),
        "other settings (steps was 1, is 2)": plan_lib.make("sd14", "abc", asked("star", "red", steps=2)),
    }
    for what, other in others.items():
        with pytest.raises(AegisError) as refused:
            ledger("three").keep_plan(other)
        assert f"memory was begun with {what}: what was begun keeps its plan" in str(refused.value)
        assert "another plan file" in str(refused.value)
    assert store.read("plan.jsonl")[0] == plan.text().encode()


def test_a_plan_reads_back_as_it_was(store):
    plan = plan_lib.make("sd14", "abc", asked("star", "梵高") + asked("star", steps=2) + [(("a", "b"), {}, None)])
    assert plan_lib.parse(plan.text(), "here") == plan
    assert [(row.settings, row.number) for row in plan.rows] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert len({row.id for row in plan.rows}) == 4 and plan.rows[1].file == f"梵高-{plan.rows[1].id}"
    first, second, *rest = plan.text().splitlines(True)
    for bad in ("", "{}", first.replace("abc", "abd") + "".join([second, *rest]), first + "[]\n", "\x00"):
        with pytest.raises(AegisError, match="here is no plan that aegis batch wrote"):
            plan_lib.parse(bad, "here")
    with pytest.raises(AegisError, match="version 2"):
        plan_lib.parse(json.dumps(json.loads(first) | {"aegis_batch": 2}) + "\n", "here")


def test_an_id_is_of_base_concepts_and_settings():
    ids = {
        plan_lib.row_id(base, concepts, values)
        for base in ("abc", "abd")
        for concepts in (["star"], ["star", "heart"], ["heart", "star"])
        for values in ({"steps": 1, "seed": 0}, {"steps": 1, "seed": 1})
    }
    assert len(ids) == 12 and plan_lib.row_id("abc", ("star",), {"b": 1, "a": 2}) == plan_lib.row_id(
        "abc", ["star"], {"a": 2, "b": 1}
    )


class Slow:
    """A store whose swaps wait for `go`, and say by `asked` that they do."""

    def __init__(self, store):
        self.store, self.asked, self.go = store, threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self.store, name)

    def swap(self, *args):
        self.asked.set()
        assert self.go.wait(30)
        return self.store.swap(*args)


def test_a_store_that_is_slow_to_renew_keeps_nobody(store):
    """What is claimed, committed and let go meanwhile is not held up, and ends as if nothing had been renewed."""
    slow = Slow(store)
    mine, other = Ledger(slow, "mine", lease=10), Ledger(store, "other", lease=10)
    assert mine.claim("a") and mine.claim("b")
    renewing = threading.Thread(target=mine.renew)
    renewing.start()
    assert slow.asked.wait(30)
    assert mine.claim("c") and mine.commit("a", {})  # while the swap of a waits
    slow.go.set()
    renewing.join(30)
    assert mine._held.keys() == {"b", "c"}
    slow.asked.clear(), slow.go.clear()
    renewing = threading.Thread(target=mine.renew)
    renewing.start()
    assert slow.asked.wait(30)
    letting_go = threading.Thread(target=mine.release)  # both swap the same claim
    letting_go.start()
    slow.go.set()
    renewing.join(30), letting_go.join(30)
    assert mine._held == {} and other.abandoned(["b", "c"]) == {"b": 0, "c": 0}


class Signalled:
    """A store with which signals come `before` the first swap of a claim, and `after` it, but before its answer."""

    def __init__(self, store, before=(), after=()):
        self.store, self.before, self.after = store, before, after

    def __getattr__(self, name):
        return getattr(self.store, name)

    def create(self, *args):
        return self._asked(self.store.create, *args)

    def swap(self, *args):
        return self._asked(self.store.swap, *args)

    def _asked(self, ask, key, *args):
        if not key.startswith("claims/"):
            return ask(key, *args)
        (before, after), self.before, self.after = (self.before, self.after), (), ()
        for each in before:
            signal.raise_signal(each)
        answer = ask(key, *args)
        for each in after:
            signal.raise_signal(each)
        return answer


@pytest.mark.parametrize("what", ["claim", "take", "fail"])
def test_a_signal_in_the_middle_of_a_claim_leaves_none(store, what):
    """Nobody has to wait for the lease of what this worker did not yet know to be its own, or no longer."""
    mine, other = Ledger(store, "mine"), Ledger(store, "other")
    if what != "claim":
        assert mine.claim("a")
    if what == "take":
        mine.release()
        assert mine.abandoned(["a"]) == {"a": 0}
    calls = {"claim": lambda: mine.claim("a"), "take": lambda: mine.take("a", 0)}
    calls["fail"] = lambda: mine.fail("a", "no luck", final=False)
    mine.store = Signalled(store, **{"before" if what == "fail" else "after": [signal.SIGTERM]})
    with pytest.raises(Stopped), stoppable(), mine.renewing():
        calls[what]()
    assert other.abandoned(["a"]) == {"a": 0}


def test_a_second_signal_does_not_wait_for_the_store(store):
    mine = Ledger(Signalled(store, after=[signal.SIGTERM, signal.SIGINT]), "mine")
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped) as stopped, stoppable():
        mine.claim("a")
    assert stopped.value.signum == signal.SIGINT and not mine._held
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
