"""`aegis batch status`: how far a batch has come, told by its ledger alone, from any machine and without JAX."""

import time

from aegis_jax.batch import plan as plan_lib
from aegis_jax.batch.ledger import records, survey
from aegis_jax.batch.store import PLAN, Store, open_store
from aegis_jax.run.progress import duration

LISTED = 20  # failures that are named


def text(store: Store, *, now: float) -> str:
    """What is done, running, failed and left, and for how long. now: seconds since 1970."""
    plan = plan_lib.parse(store.read(PLAN)[0].decode(errors="replace"), f"{store.place}/{PLAN}")
    found = survey(store)
    rows = {row.id: row for row in plan.rows}
    done = [row for row in rows if row in found.done]
    failed = [row for row in rows if row in found.failed and row not in found.done]
    claims = records(store, "claims", [row for row in rows if found.is_open(row) and row in found.claimed])
    held = {row: claim for row, claim in claims.items() if claim["state"] == "held"}
    running = {row: claim for row, claim in held.items() if now - claim["time"] <= claim["lease"]}
    silent = held.keys() - running.keys()
    workers = {claim["worker"] for claim in running.values()}
    left = len(rows) - len(done) - len(failed) - len(running)
    lines = [f"plan      {len(rows)} erasures from {plan.model}", f"done      {len(done)}"]
    lines += [f"running   {len(running)}" + (f" ({', '.join(sorted(workers))})" if workers else "")]
    lines += [f"failed    {len(failed)}"]
    reasons = records(store, "failed", failed[:LISTED])
    lines += [
        f"          {rows[row].name}: {said['reason']} (attempt {said['attempt']})" for row, said in reasons.items()
    ]
    lines += [f"          and {len(failed) - LISTED} more"] if len(failed) > LISTED else []
    lines += [f"left      {left}" + (f" ({len(silent)} of a worker that is silent)" if silent else "")]
    if left or running:
        lines += [f"time left {_time_left(store, done, left + len(running), len(workers))}"]
    return "\n".join(lines)


def _time_left(store: Store, done: list[str], left: int, workers: int) -> str:
    """By what the rows that are done took, and as many workers as now."""
    if not workers:
        return "no worker is running: start the same command again"
    if not done:
        return "not known before the first is done"
    seconds = [record["seconds"] for record in records(store, "done", done).values()]
    return f"about {duration(left * sum(seconds) / len(seconds) / workers)}"


def show(place: str) -> None:
    """Prints it. Raises `AegisError` where there is no batch."""
    print(text(open_store(place), now=time.time()))
