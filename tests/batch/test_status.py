"""`aegis batch status`: the story that the ledger tells, without JAX."""

import subprocess
import sys

import pytest

from aegis_jax.batch import plan as plan_lib
from aegis_jax.batch import status
from aegis_jax.batch.ledger import Ledger
from aegis_jax.errors import AegisError
from tests.batch import racing


@pytest.fixture
def batch(monkeypatch):
    """A batch of eight rows, of which two are done, one has failed, two run, one is lost and one was let go."""
    monkeypatch.setattr("time.time", lambda: 1000.0)
    asked = [((name,), {}, None) for name in ("star", "heart", "moon", "ring", "red", "blue", "plain", "dotted")]
    plan, store = plan_lib.make("world", "abc", asked), racing.store()
    one, two, lost = (Ledger(store, name, lease=60) for name in ("host-1", "host-2", "host-3"))
    one.keep_plan(plan)
    for ledger, row in zip((one, one, one, one, two, lost, two), plan.rows):
        assert ledger.claim(row.id)
    one.commit(plan.rows[0].id, {"seconds": 20.0})
    one.commit(plan.rows[1].id, {"seconds": 40.0})
    one.fail(plan.rows[2].id, "step 3: L_e is not finite", final=True)
    two.fail(plan.rows[6].id, "hiccup", final=False)
    monkeypatch.setattr("time.time", lambda: 1100.0)
    one.renew()
    two.renew()
    return store, plan


def test_status(batch):
    store, _ = batch
    # 30 s each, five left, two workers
    assert (
        status.text(store, now=1130.0)
        == """\
plan      8 erasures from world
done      2
running   2 (host-1, host-2)
failed    1
          moon: step 3: L_e is not finite (attempt 1)
left      3 (1 of a worker that is silent)
time left about 1 min 15 s"""
    )


def test_status_when_nobody_works(batch):
    store, plan = batch
    assert "running   0\n" in status.text(store, now=2000.0)
    assert status.text(store, now=2000.0).endswith("no worker is running: start the same command again")
    rest = Ledger(store, "host-4")
    for row in plan.rows[3:]:
        rest.commit(row.id, {"seconds": 1.0})
    assert status.text(store, now=2000.0).endswith("left      0")
    empty = racing.store()
    Ledger(empty, "w").keep_plan(plan)
    said = status.text(empty, now=0.0)
    assert "done      0" in said and "left      8" in said and said.endswith("start the same command again")
    Ledger(empty, "w").claim(plan.rows[0].id)
    assert status.text(empty, now=1100.0).endswith("not known before the first is done")


def test_in_another_terminal_without_jax(tmp_path):
    with pytest.raises(AegisError, match="holds no batch"):
        status.show(tmp_path)
    store = racing.open_store(tmp_path / "out", new=True)
    Ledger(store, "w").keep_plan(racing.plan(3))
    code = (
        "import sys; from aegis_jax.cli import main; code = main(['batch', 'status', sys.argv[1]]); "
        "print('heavy', *{'jax', 'flax', 'orbax', 'transformers'} & sys.modules.keys()); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("plan      3 erasures from model\n") and done.stdout.endswith("\nheavy\n")
