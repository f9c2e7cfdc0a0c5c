"""`aegis evaluate` and `aegis_jax.evaluate`: erases baselines, measures cells, writes the report; resumable.

The folder of an evaluation:
evaluation.json   what was asked for last
baselines/NAME/   run folders of the baselines
cells/            a JSON and mostly a PNG a cell, named by a hash of all that it depends on
report.json       every figure with count, n, interval, seeds, cost and command
report.html       the same for people, one file
"""

import json
import os
import shlex
import time
from pathlib import Path

import numpy as np
from PIL import Image

from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.report import figures, page
from aegis_jax.report.measure import Bench, Measured
from aegis_jax.report.plan import Plan, key, model_digest, plan, versions
from aegis_jax.report.rows import Row
from aegis_jax.run import claim, loop, manifest
from aegis_jax.run.erase import erase
from aegis_jax.run.folder import RunFolder, disk_errors, write_json, write_text
from aegis_jax.run.progress import Progress, Silent, duration

MARK = "evaluation.json"


def evaluate(models=(), *, base, concept, show=False, progress=None, command=None, **asked) -> dict:
    """Examines models, their base and baselines; what report.json holds. See `plan.plan` for `asked`.

    models: run folders or diffusers folders. show: pictures are not blurred (embedded worlds' never are). progress: for
    example `run.progress.Progress()`; command: what the report calls the command that made it.
    Cells that OUT holds are not measured again. Raises `AegisError` for all that cannot be, before anything starts.
    """
    progress = progress or Silent()
    what, pipelines = plan(models, base, concept, **asked)
    _check_folder(what.out)
    with claim.claimed(what.out), disk_errors(what.out):
        _check_folder(what.out)
        (what.out / "cells").mkdir(exist_ok=True)
        write_json(
            what.out / MARK, {"concept": what.text, "base": what.base, "command": command, "now": manifest.now()}
        )
        bench = Bench(what.subject)
        baselines = [row for row in what.rows if row.role == "baseline"]
        _check_base(what, [row for row in baselines if _finished(row)], pipelines["base"])
        if not all(map(_finished, baselines)):
            for seed in what.seeds:  # a base that shows the concept nowhere is told before anything is erased
                what.subject.cases(what.cases, seed, None)
        for row in baselines:
            pipelines[row.name] = _erased(what, row, pipelines["base"], progress)
        lines = _measured(what, bench, pipelines, progress)
        report = figures.report(what, lines, {"command": command, "show": show})
        write_json(what.out / "report.json", report)
        write_text(what.out / "report.html", page.html(report, what))
    return report


def command(models, argv: list[str], **asked) -> None:
    """`aegis evaluate`; argv: as typed."""
    progress = Progress()
    try:
        report = evaluate(models, progress=progress, command=shlex.join(["aegis", *argv]), **asked)
    except KeyboardInterrupt as stopped:
        progress.say("what is finished is kept; the same command goes on")
        raise stopped
    finally:
        progress.end()
    print(figures.text(report))
    print(f"report   {Path(report['folder']) / 'report.html'}")


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise AegisError(f"{out} is a file: name another --out")
    if out.is_dir() and not (out / MARK).is_file() and any(entry.name != claim.LOCK for entry in out.iterdir()):
        raise AegisError(f"{out} exists and holds no evaluation: name another --out")


def _check_base(what: Plan, finished: list[Row], base) -> None:
    """Raises `AegisError` for a baseline that was erased from another model than the base as it is now."""
    own = manifest.fingerprint(base) if finished else None
    for row in finished:
        if RunFolder(row.run).read_manifest()["model"]["fingerprint"] != own:
            raise AegisError(f"{row.run} was erased from another model than {what.base}: name another --out")


def _erased(what: Plan, row: Row, base, progress):
    """The baseline's pipeline, erased where it is not yet."""
    begun = RunFolder(row.run).is_run()
    if not _finished(row):
        progress.say(f"erasing {what.text!r} by {row.config.erase.method}")
        try:
            erase(base, [what.text], config=row.config, out=row.run, resume=begun, progress=progress)
        except loop.NonFiniteError as error:
            raise AegisError(f"baseline {row.name}: {error}") from error
    return load_pipeline(row.model)


def _finished(row: Row) -> bool:
    return RunFolder(row.run).is_run() and RunFolder(row.run).read_manifest().get("status") == "finished"


def _measured(what: Plan, bench: Bench, pipelines: dict, progress) -> list[dict]:
    """The lines of all cells: {"row", "cell", "figures", "unet_evaluations", "seconds", "prompts", "file"}."""
    digests = {name: model_digest(pipeline) for name, pipeline in pipelines.items()}
    shared = {"base": digests["base"], "versions": versions()}
    todo, lines = [], []
    for row, cell in what.cells():
        cell = cell | {"model": digests[row.name], **shared}
        file = what.out / "cells" / f"{key(cell)}.json"
        line = _read(file, cell)
        if line is None:
            todo.append((row, cell, file))
        else:
            lines.append(line | {"row": row.name})
    if lines:
        progress.say(f"{len(lines)} cells are there already, {len(todo)} are to be measured")
    began, costs = time.perf_counter(), _Costs(lines)
    for count, (row, cell, file) in enumerate(todo, 1):
        found = bench.measure(pipelines[row.name], cell, what.attacks.get(cell["kind"]), _inner(progress))
        progress.end()
        line = _written(file, cell, found)
        lines.append(line | {"row": row.name})
        costs.add(line)
        left = sum(costs.of(c) for _, c, _ in todo[count:])
        rate = 60 * count / (time.perf_counter() - began)
        progress.say(
            f"{count} of {len(todo)}: {_named(cell)} on {row.name}, {found.seconds:.0f} s; "
            f"{rate:.1f} cells a minute, {duration(left)} left"
        )
    return lines


def _named(cell: dict) -> str:
    control = f" (control: {cell['neutral']})" if cell["neutral"] is not None else ""
    return f"{cell['kind']}{control}, seed {cell['seed']},"


def _inner(progress):
    """How far a cell is, on a terminal alone: elsewhere a line a cell is enough."""
    if not getattr(progress, "is_terminal", False):
        return None
    progress.start(0, 100, is_compiled=True)
    return lambda done, total, loss: progress.update(100 * done // max(total, 1), loss)


class _Costs:
    """Seconds that a cell takes: those of the last of its kind, as the first compiles; of a new kind, the mean."""

    def __init__(self, lines: list[dict]):
        self.seconds: dict[str, float] = {}
        for line in lines:
            self.add(line)

    def add(self, line: dict) -> None:
        self.seconds[line["cell"]["kind"]] = line["seconds"]

    def of(self, cell: dict) -> float:
        return self.seconds.get(cell["kind"], sum(self.seconds.values()) / len(self.seconds))


def _read(file: Path, cell: dict) -> dict | None:
    """The line of a cell that was measured, or None; what cannot be read, or lacks its picture, is measured again."""
    try:
        line = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(line, dict) and line.get("cell") == json.loads(json.dumps(cell))
    return line if whole and (not line["prompts"] or _is_picture(file.with_suffix(".png"))) else None


def _is_picture(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for files that are none, or were cut
        return False
    return True


def _written(file: Path, cell: dict, found: Measured) -> dict:
    """Writes picture and line, the line last: where it is the cell is whole."""
    if found.prompts:
        part = file.with_suffix(".part")
        strip = np.concatenate(list(found.pictures), axis=1)
        with open(part, "wb") as stream:
            Image.fromarray(strip).save(stream, "PNG")
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file.with_suffix(".png"))
    line = {
        "cell": cell, "figures": found.figures, "unet_evaluations": round(found.unet_evaluations),
        "seconds": round(found.seconds, 2), "prompts": found.prompts, "finished": manifest.now(), "file": file.stem,
    }  # fmt: skip
    write_json(file, line)
    return line
