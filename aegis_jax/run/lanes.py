"""Many erasures of one pipeline, K at a time: as lanes of one batch where the settings allow it, else one by one.

    aegis_jax.erase_each("world", ["star", "heart", "red"], config="world", lanes=8)

Nothing is written, and a group of lanes that is interrupted is to be begun again.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from aegis_jax.erasure import lanes as lanes_lib
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import Pipeline, load_pipeline
from aegis_jax.parallel.mesh import lanes_mesh
from aegis_jax.run import cache
from aegis_jax.run.asked import each_once, settings
from aegis_jax.run.config import RunConfig
from aegis_jax.run.erase import EraseResult, in_full, off_device, on_device, trained, with_drift
from aegis_jax.run.folder import device_errors
from aegis_jax.run.loop import NonFiniteError
from aegis_jax.run.progress import Progress, Silent
from aegis_jax.run.tensors import TensorLog

LANES = 8  # on each device


@dataclasses.dataclass(frozen=True)
class Erased:
    """What an erasure has come to.

    Attributes:
      drift: {component: {leaf path: array}} in the host's memory, what is to be added to the pipeline's parameters.
      metrics, per_tensor, tensors: as those of `EraseResult`.
    """

    drift: dict
    metrics: list[dict]
    per_tensor: dict
    tensors: list[str]


def erase_each(
    pipeline=None, concepts=None, *, config=None, overrides=(), lanes: int = LANES, progress: Progress | None = None
) -> list[EraseResult | AegisError]:
    """Each of the concepts erased on its own, from the same pipeline and with the same settings: a list in their order.

    The arguments are those of `aegis_jax.erase`; concepts: a list with, for each run, a text or a list of texts.
    lanes: how many runs share a batch on each device. The results are those of separate runs with the same seed, up to
    the order of sums, which can turn a sign step where its gradient is all but 0. A run that stops being finite leaves
    its `NonFiniteError` in the place of its result, and the others go on. The erased pipelines share every tensor that
    was not trained.

    Raises `AegisError` for bad input before anything is computed. Where runs go one after another, one that cannot be
    started leaves its `AegisError` in its place, if another has been computed before it.
    """
    progress, runs = progress or Silent(), _runs(concepts)
    run = settings(pipeline, runs[0], config, overrides)
    if not isinstance(pipeline, Pipeline):
        pipeline = off_device(load_pipeline(run.model, revision=run.revision or None, variant=run.variant or None))
    with device_errors("lower lanes, or " * (width(run, lanes) > 1) + run.method.smaller):
        all_found = list(erase_lanes(pipeline, runs, run, lanes=lanes, progress=progress))
    # Only now, since training needs the device's room, and once, so that all results share what was not trained.
    changed = {name for found in all_found if isinstance(found, Erased) for name in found.drift}
    original = on_device(pipeline)
    base = in_full(original, changed)  # the same arrays, where they are in float32
    return [
        EraseResult(
            with_drift(base, found.drift), found.metrics, found.per_tensor, found.tensors, None,
            dataclasses.replace(run, concepts=texts), original,
        )
        if isinstance(found, Erased)
        else found
        for texts, found in zip(runs, all_found, strict=True)
    ]  # fmt: skip


def _runs(concepts) -> list[tuple[str, ...]]:
    listed = [] if isinstance(concepts, str) or not isinstance(concepts, Iterable) else list(concepts)
    runs = [[run] if isinstance(run, str) or not isinstance(run, Iterable) else list(run) for run in listed]
    if not runs or not all(run and all(isinstance(text, str) for text in run) for run in runs):
        raise AegisError(f"concepts={concepts!r}; give a list with a text, or a list of texts, for each erasure")
    return [each_once(run) for run in runs]


def erase_lanes(
    pipeline: Pipeline, concepts: list, run: RunConfig, *, lanes: int = LANES, progress: Progress | None = None
) -> Iterator[Erased | AegisError]:
    """For each run's concepts, in their order, what its erasure has come to, or why it stopped being finite and when.

    run: the settings of all; its own concepts do not matter. lanes: how many at once on each device of this host. The
    last group is filled up with its last run, so that all groups have one shape. Where the settings allow no lanes the
    runs go one by one, and `progress` says why.

    Raises `AegisError` for concepts or settings that no run can be started with; of lanes before any is computed.
    """
    progress, runs = progress or Silent(), _runs(concepts)
    _check(lanes)
    mesh, refused = lanes_mesh(), _refused(run, runs)
    devices = 1 if mesh is None else mesh.size
    count = devices * min(lanes, math.ceil(len(runs) / devices))
    if count == 1 or len(runs) == 1 or refused:
        if count > 1 and len(runs) > 1:
            progress.say(f"one erasure after another, not as lanes: {refused}")
        yield from _one_by_one(pipeline, runs, run, progress, {})
        return
    filled = [*runs, *runs[-1:] * (-len(runs) % count)]
    started = lanes_lib.spread(run.method.lanes.start(pipeline, filled, run.erase), mesh)
    compiled: dict = {}
    for first in range(0, len(started), count):
        group = dict(enumerate(runs[first : first + count]))
        trained = _together(pipeline, started[first : first + count], group, run, mesh, progress, compiled)
        yield from (found for _, found in trained)


def width(run: RunConfig, lanes: int = LANES) -> int:
    """How many runs of these settings share a batch on this host, `lanes` on each device; 1 where they cannot."""
    _check(lanes)
    mesh = lanes_mesh()
    return 1 if _refused(run, []) else lanes * (1 if mesh is None else mesh.size)


def erase_group(
    pipeline: Pipeline, runs: dict, run: RunConfig, *, lanes: int = LANES, progress: Progress | None = None,
    compiled: dict | None = None,
) -> Iterator[tuple[int, Erased | AegisError]]:  # fmt: skip
    """(lane, what its erasure has come to) of runs that each have their lane: {lane: its concepts}.

    Always as many lanes as `width` says, the free ones filled with a run that is there: what comes of one depends
    on its lane, but neither on its company nor on whether it has any. Where the settings allow no lanes the runs go
    one by one. compiled: what was compiled for this pipeline, to be given again; a group of as many concepts and the
    same settings then compiles nothing.

    Raises `AegisError` for concepts or settings that no run can be started with.
    """
    progress, compiled = progress or Silent(), {} if compiled is None else compiled
    if _refused(run, list(runs.values())):
        progress.say(f"erasing {', '.join(' + '.join(texts) for texts in runs.values())}")
        yield from zip(runs, _one_by_one(pipeline, list(runs.values()), run, progress, compiled))
        return
    mesh, any_of_them = lanes_mesh(), next(iter(runs.values()))
    filled = [list(runs.get(k, any_of_them)) for k in range(width(run, lanes))]
    spread, start = lanes_lib.spread, run.method.lanes.start
    yield from _together(
        pipeline, spread(start(pipeline, filled, run.erase), mesh), runs, run, mesh, progress, compiled
    )


def _together(
    pipeline, started, runs: dict, run, mesh, progress, compiled
) -> Iterator[tuple[int, Erased | AegisError]]:
    """(lane, what it has come to) of the lanes that `runs` names; started: [(state, frozen), ...] of all."""
    state, frozen, own = lanes_lib.stack(started, mesh)
    count = len(started)
    del started  # a group that was started for itself: the device has the stack of it
    names = [" + ".join(texts) for texts in runs.values()]
    key = run.erase, len(next(iter(runs.values()))), count
    progress.say(f"erasing {len(names)} at once: {', '.join(names)}")
    progress.start(0, run.erase.steps, key in compiled)
    if key not in compiled:
        single = functools.partial(run.method.step, config=run.erase)
        with cache.compiling():
            compiled[key] = lanes_lib.compiled_step(single, state, frozen, own, mesh)
    state, books = _train(compiled[key], state, frozen, pipeline, run, progress, count)
    for k in runs:
        yield k, _result(pipeline, state, k, books[k], run)


def _check(lanes: int) -> None:
    if not isinstance(lanes, numbers.Integral) or lanes < 1:
        raise AegisError(f"lanes={lanes!r}, wanted a whole number, 1 or more")


def _refused(run: RunConfig, runs: list) -> str | None:
    """Why the runs cannot be lanes, or None."""
    if run.mesh.data * run.mesh.fsdp > 1:
        return f"mesh.data={run.mesh.data} x mesh.fsdp={run.mesh.fsdp} spreads each over devices"
    if len(set(map(len, runs))) > 1:
        return "they erase different numbers of concepts"
    return run.method.without_lanes(run.erase)


def _one_by_one(pipeline, runs: list, run: RunConfig, progress, compiled: dict) -> Iterator[Erased | AegisError]:
    for number, texts in enumerate(runs):
        key = run.erase, len(texts)
        try:
            single = dataclasses.replace(run, concepts=tuple(texts))
            drift, metrics, log = trained(single, pipeline, progress, is_compiled=key in compiled)
        except AegisError as stopped:
            # What keeps the first from starting may keep all, and nothing is lost yet.
            if number == 0 and not isinstance(stopped, NonFiniteError):
                raise
            yield stopped
        else:
            compiled[key] = True
            yield Erased(_on_host(drift), metrics, log.arrays(), log.names)


def _on_host(drift: dict) -> dict:
    return {name: {path: np.asarray(move) for path, move in moves.items()} for name, moves in drift.items()}


@dataclasses.dataclass
class _Book:
    """What is written down of one lane; nothing after the step at which it stopped being finite."""

    log: TensorLog
    remedy: str
    metrics: list[dict] = dataclasses.field(default_factory=list)
    stopped: NonFiniteError | None = None

    def record(self, step: int, method: str, values: dict, per_tensor: dict) -> None:
        if self.stopped is not None:
            return
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self.stopped = NonFiniteError(step, ", ".join(bad), self.remedy)
        self.metrics.append({"step": step, "method": method, **values})
        self.log.append(per_tensor)


def _train(step, state, frozen, pipeline, run: RunConfig, progress, count: int):
    """(the last state of a group of lanes, their books). Ends early only if none is finite any more."""
    names = run.method.tensors(pipeline, run.erase)
    books, pending = [_Book(TensorLog(names), run.method.remedy) for _ in range(count)], None

    def record(number, metrics):
        host = jax.device_get(metrics)
        per_tensor = host.pop("per_tensor", {})
        for k, book in enumerate(books):
            values = {name: float(value[k]) for name, value in host.items()}
            book.record(number, run.erase.method, values, {name: rows[k] for name, rows in per_tensor.items()})
        finite = [loss for loss in host["L_e"] if math.isfinite(loss)]
        progress.update(number, float(np.mean(finite)) if finite else math.nan)

    for number in range(1, run.erase.steps + 1):
        state, metrics = step(state, frozen)
        if pending is not None:  # only now, so that the device never waits for the host
            record(*pending)
        pending = number, metrics
        if all(book.stopped for book in books):
            break
    record(*pending)
    for book, finite in zip(books, np.asarray(lanes_lib.finite(state))):
        if not finite and book.stopped is None:
            book.stopped = NonFiniteError(number, "the state", book.remedy)
    return state, books


def _result(pipeline, state, k: int, book: _Book, run: RunConfig) -> Erased | NonFiniteError:
    if book.stopped is not None:
        return book.stopped
    drift = run.method.drift(pipeline, lanes_lib.lane(state, k), run.erase)
    return Erased(_on_host(drift), book.metrics, book.log.arrays(), book.log.names)
