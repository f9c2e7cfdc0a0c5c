"""Workers in processes of their own, with erasures that cost nothing: what a ledger is worth when they race and die.

No JAX in here, so that a process is there in a moment: it is forked from one that has imported all of this.
"""

import hashlib
import multiprocessing
import time

import tensorstore

from aegis_jax.batch import plan as plan_lib
from aegis_jax.batch.ledger import Ledger
from aegis_jax.batch.store import Store, open_store
from aegis_jax.batch.worker import Result, work

WIDTH = 3


def processes():
    """A multiprocessing context whose processes start with this module loaded and nothing of it used."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def store() -> Store:
    """An empty store in memory."""
    return Store(tensorstore.KvStore.open("memory://").result(), "memory")


def plan(count: int) -> plan_lib.Plan:
    return plan_lib.make("model", "hash", [((f"concept {n}",), {"steps": 1}, None) for n in range(count)])


def content(row, lane: int) -> bytes:
    """What an erasure comes to: all that it may depend on, and its lane."""
    return hashlib.sha256(f"{row.id} in lane {lane}".encode()).digest() * 64


def erase(seconds: float, log=None):
    """A stand-in for erasures of a group, which takes `seconds` before the first is there."""

    def erase(group):
        time.sleep(seconds)
        for lane, row in group.items():
            if log is not None:
                log.append(row.name)
            yield lane, Result({".safetensors": content(row, lane)}, {})

    return erase


def worker(folder: str, name: str, count: int, seconds: float, lease: float):
    ledger = Ledger(open_store(folder, new=True), name, lease=lease)
    ours = plan(count)
    ledger.keep_plan(ours)
    work(ours, ledger, erase(seconds), lambda row: WIDTH, poll=0.02)


def race(folder: str, name: str, count: int, barrier, won):
    """Claims every row it can, at the same time as others."""
    ledger = Ledger(open_store(folder, new=True), name)
    barrier.wait()
    won.put([row.id for row in plan(count).rows if ledger.claim(row.id)])
