"""What every benchmark needs: variants in processes of their own in the order A B A B, medians and ranges, results.

A process of its own gives each trial the same start: no compiled program, no warm allocator and no high-water mark of
another's. The alternation spreads what drifts (clock, page cache, neighbours) over the variants.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = "jax jaxlib flax optax numpy safetensors torch diffusers transformers accelerate".split()
MARK = "RESULT "  # before the one line of JSON that a trial prints


def alternate(commands: dict[str, list], rounds: int, *, say=True) -> dict[str, list[dict]]:
    """Runs each command `rounds` times, one at a time, in turn; returns what their `report` lines held."""
    results: dict[str, list[dict]] = {name: [] for name in commands}
    for count in range(rounds):
        for name, command in commands.items():
            if say:
                print(f"round {count + 1}/{rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(trial(command))
    return results


def trial(command: list) -> dict:
    """The `report` of one command in a process of its own; its errors pass through."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=environment())
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise SystemExit(f"trial failed with code {done.returncode}: {' '.join(map(str, command))}\n{done.stdout}")
    return json.loads(lines[-1].removeprefix(MARK))


def environment(**more) -> dict:
    """This process's environment with the checkout first on the path, so that it is what is measured."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}


def report(**values) -> None:
    """Prints a trial's result for `trial`."""
    print(MARK + json.dumps(values), flush=True)


def spread(values) -> dict:
    """{"median", "p10", "p90", "n"} of some numbers; the range of few is that of the smallest and the largest."""
    values = sorted(values)
    if len(values) > 1:
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        low, high = tenths[0], tenths[-1]
    else:
        low = high = values[0]
    return {"median": statistics.median(values), "p10": low, "p90": high, "n": len(values)}


def figures(results: list[dict]) -> dict:
    """`spread` of every number that the trials of one variant reported."""
    keys = [key for key, value in results[0].items() if isinstance(value, (int, float))]
    return {key: spread([result[key] for result in results]) for key in keys}


def ratio(over: list[dict], under: list[dict], key: str) -> dict:
    """`spread` of over / under, taken within each round, so that a slow spell of the machine cancels."""
    return spread([a[key] / b[key] for a, b in zip(over, under, strict=True)])


def shown(value: dict, digits: int = 2) -> str:
    """median (p10-p90) as text."""
    return f"{value['median']:.{digits}f} ({value['p10']:.{digits}f}-{value['p90']:.{digits}f})"


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def about() -> dict:
    """Versions, date and machine; a package that is not there is null."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],  # of other work on this machine: above 0.5 the times are not to be trusted
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(path: pathlib.Path | None, result: dict) -> None:
    """Writes a result as JSON, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}", file=sys.stderr)
