"""What `aegis batch` does between parsing and printing."""

import os
import socket
import uuid
from pathlib import Path

from aegis_jax.batch import plan as plan_lib
from aegis_jax.batch import rows
from aegis_jax.batch.erasing import Eraser, base_hash
from aegis_jax.batch.ledger import LEASE, Ledger, records, survey
from aegis_jax.batch.store import Store, open_store
from aegis_jax.batch.worker import stoppable, work
from aegis_jax.errors import AegisError
from aegis_jax.io import delta, delta_apply
from aegis_jax.io.hub import expand, place
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.run.asked import settings
from aegis_jax.run.config import RunConfig
from aegis_jax.run.erase import off_device
from aegis_jax.run.lanes import LANES
from aegis_jax.run.progress import Progress

LISTED = 10  # failures that are named


def batch(plan_file, model, out, *, config, overrides, lanes: int | None, lease: float | None) -> int:
    """`aegis batch`: one worker, until all is done, by whom it may be; 1 if something failed for good, else 0."""
    lanes, lease = LANES if lanes is None else lanes, LEASE if lease is None else lease
    if lanes < 1:
        raise AegisError(f"--lanes {lanes}: wanted 1 or more")
    if not 1 <= lease < 1e6:
        raise AegisError(f"--lease {lease:g}: wanted 1 second or more")
    rows.check_keys(key for key, _ in overrides if key not in ("revision", "variant"))
    path, progress = expand(plan_file), Progress()
    asked = rows.read(path)
    store = open_store(out, new=True)
    run = settings(model, asked.rows[0].concepts, config, overrides)
    if run.mesh.data * run.mesh.fsdp > 1:  # of a config file
        raise AegisError(
            f"mesh.data={run.mesh.data} x mesh.fsdp={run.mesh.fsdp}: a batch has no meshes, each erasure is on one "
            "device; set both to 1"
        )
    pipeline = off_device(load_pipeline(run.model, revision=run.revision or None, variant=run.variant or None))

    def fits(run, concepts):
        if run.method.check_concepts:
            run.method.check_concepts(pipeline, list(concepts), run.erase)

    found, name = rows.check(asked, run, fits), place(run.model)
    name = Path(name).name if Path(name).is_absolute() else name
    hashes = delta.base_hashes(pipeline.source.folder)
    plan = plan_lib.make(name, base_hash(pipeline.source.folder, hashes), found)
    ledger = Ledger(store, _worker_name(), lease=lease)
    ledger.keep_plan(plan)
    progress.say(f"worker {ledger.worker}: a plan of {len(plan.rows)} erasures from {name}")
    erase = Eraser(pipeline, name, hashes, lanes, progress)
    with stoppable():
        try:
            work(plan, ledger, erase, erase.width, progress=progress)
        finally:
            progress.end()
    return _summary(plan, store, run)


def _worker_name() -> str:
    """Host and process, for people, and what no other worker has."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def _summary(plan: plan_lib.Plan, store: Store, run: RunConfig) -> int:
    """Prints what has come of all rows; the exit code."""
    now, where = survey(store), store.place.rstrip("/")
    done = [row for row in plan.rows if row.id in now.done]
    failed = [row for row in plan.rows if row.id in now.failed and row.id not in now.done]
    print(f"done     {len(done)} of {len(plan.rows)}")
    reasons = records(store, "failed", (row.id for row in failed[:LISTED]))
    for row in failed[:LISTED]:
        print(f"failed   {row.name}: {reasons[row.id]['reason']}")
    if len(failed) > LISTED:
        print(f"failed   and {len(failed) - LISTED} more")
    print(f"results  {where}/results")
    if done and "://" not in where:
        first = f"{where}/results/{done[0].file}.safetensors"
        print(f"apply    {delta_apply.command(first, run.model, run.revision, run.variant)}")
    return 1 if failed else 0
