"""A study as a file of lines: each cell is measured once, and a study that was stopped goes on where its file ends.

    cells = grid(seed=(0, 1, 2), concept=("star", "red"), preset=("paper", "esd"))
    run(cells, measure, RESULTS / "study.jsonl")           two workers: share="0/2" and share="1/2", one file
    for cell, figures in over_seeds(read(RESULTS / "study.jsonl")): ...

A cell is a dict of JSON values that holds all that its figures depend on (settings, seed, a hash of what is measured).
`measure(cell)` returns its figures, a dict of JSON values. Each line holds cell, figures, seconds and provenance.
"""

import dataclasses
import fcntl
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable

from benchmarks import trials

RESULTS = trials.RESULTS


def grid(**axes) -> list[dict]:
    """A cell for every combination of the axes' values; the first axis changes slowest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def stated(settings) -> str:
    """Settings as text, without what is at its class's default, so that one which is added later changes no cell. (A
    default that changes means other things by the same text: then rename it.)"""
    if not dataclasses.is_dataclass(settings):
        return repr(settings)
    usual = {f.name: f.default for f in dataclasses.fields(settings)}
    values = {name: getattr(settings, name) for name in usual}
    said = [f"{name}={stated(value)}" for name, value in sorted(values.items()) if value != usual[name]]
    return f"{type(settings).__name__}({', '.join(said)})"


def key(cell: dict) -> str:
    """What makes two cells the same: their values, in any order and as they come back from JSON."""
    return json.dumps(cell, sort_keys=True)


def read(path: pathlib.Path) -> list[dict]:
    """The lines of a file, or none; what a killed writer left of a line does not count."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def run(cells: Iterable[dict], measure: Callable[[dict], dict], path: pathlib.Path, *, share: str = "0/1") -> None:
    """Measures the cells that the file does not hold yet; a line is added after each.

    share: "I/N", of N workers on one file this is number I, from 0. What `measure` raises ends the run; the lines stay.
    """
    worker, workers = map(int, share.split("/"))
    done = {key(line["cell"]) for line in read(path)}
    todo = [cell for cell in list(cells)[worker::workers] if key(cell) not in done]
    print(f"{len(todo)} cells to measure, results in {path}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    for count, cell in enumerate(todo, 1):
        began = time.perf_counter()
        figures = measure(cell)
        seconds = round(time.perf_counter() - began, 1)
        _append(path, {"cell": cell, "figures": figures, "seconds": seconds, "about": trials.about()})
        shown = {name: round(value, 3) for name, value in figures.items() if isinstance(value, float)}
        print(f"{count}/{len(todo)} {key(cell)} {seconds} s {shown}", file=sys.stderr, flush=True)


def _append(path: pathlib.Path, line: dict) -> None:
    """One whole line, in the place of what a killed writer left of one; other workers wait."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(line).encode() + b"\n")


def over_seeds(lines: list[dict]) -> list[tuple[dict, dict]]:
    """(cell without its seed, {figure: {"mean", "error", "seeds"}}) in the file's order, of figures that are numbers.

    error: the mean's standard error over seeds; NaN of a single one.
    """
    found: dict[str, list[dict]] = {}
    for line in lines:
        cell = {name: value for name, value in line["cell"].items() if name != "seed"}
        found.setdefault(key(cell), []).append(line["figures"])
    return [(json.loads(cell), _means(figures)) for cell, figures in found.items()]


def _means(figures: list[dict]) -> dict:
    result = {}
    for name, first in figures[0].items():
        if isinstance(first, int | float):
            values = [each[name] for each in figures]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            result[name] = {"mean": statistics.fmean(values), "error": error, "seeds": len(values)}
    return result
