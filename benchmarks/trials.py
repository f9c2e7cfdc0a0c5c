"""What every benchmark needs: its options, sides in processes of their own in the order A B A B, medians, provenance.

A process of its own gives each trial the same start: no compiled program, no warm allocator and no high-water mark of
another's. The alternation spreads what drifts (clock, page cache, neighbours) over the variants.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = "jax jaxlib flax optax numpy safetensors torch diffusers transformers accelerate".split()
MARK = "RESULT "  # before the one line of JSON that a trial prints


def parser(doc: str, result: str, *, rounds: int | None = None, sides=None) -> argparse.ArgumentParser:
    """The options that benchmarks share. doc: the script's docstring; result: name of its file in RESULTS.

    rounds: default of --rounds, for a benchmark that has it; sides: what --side may name, see `by_sides`.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = f"JSON file for the result (default: benchmarks/results/{result})"
    found.add_argument("--out", type=pathlib.Path, default=RESULTS / result, help=where)
    if rounds is not None:
        found.add_argument("--rounds", type=int, default=rounds, help="runs of each side, in the order A B A B")
    if sides is not None:
        found.add_argument("--side", choices=tuple(sides), help=argparse.SUPPRESS)
    return found


def by_sides(name: str, sides, options: list, rounds: int) -> dict[str, list[dict]]:
    """{side: its reports} of the benchmark `name`, started anew with these options and --side for every trial."""
    command = [sys.executable, "-m", "benchmarks", name, *options, "--side"]
    return alternate({side: [*command, side] for side in sides}, rounds)


def seconds(call: Callable, repeats: int) -> list[float]:
    """The times of so many calls. A call waits for its own result."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


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
    """Revision, versions, date and machine; a package that is not there is null."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.date.today().isoformat(),
        "revision": _revision(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],  # of other work on this machine: above 0.5 the times are not to be trusted
        "versions": versions,
    }


def _revision() -> str | None:
    """Of this checkout, "+" if files differ from it; None outside one."""

    def ask(*command):
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        revision = ask("rev-parse", "--short=12", "HEAD")
        return revision and revision + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:  # no git on this machine
        return None


def memory(field: str) -> int:
    """Bytes of "VmRSS" or "VmHWM" of this process; its largest size ever where the system does not say.

    Not getrusage where there is a choice: its mark starts at what the parent process had when it forked.
    """
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def restart_high_water() -> None:
    """Sets "VmHWM" to what is resident now; where that cannot be done it stays too high rather than too low."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(path: pathlib.Path, result: dict, *, say=True) -> None:
    """Writes a result as JSON, in place of an old one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(path)
    if say:
        print(f"wrote {path}", file=sys.stderr)
