"""Start-up: `import aegis_jax`, `aegis --help`, and the time to the first step of an erasure, cold and cached.

  python -m benchmarks startup [--rounds 5]

Every figure is a whole process. The bare interpreter is measured beside them. "First step" ends when the first line
of metrics.jsonl is there; "cold" begins with an empty compilation cache, "cached" with the one that the cold run of
the same round has left.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import trials

HELP_GOAL = 0.3  # seconds
QUICK = {
    "python -c pass": ["-c", "pass"],
    "import aegis_jax": ["-c", "import aegis_jax"],
    "aegis --help": ["-m", "aegis_jax", "--help"],
}
ERASE = ("-m", "aegis_jax", "erase", "--model", "world", "--concept", "star", "--config.picture.images=0")
QUICK_PER_ROUND = 4


def seconds(arguments: list) -> float:
    """The time of one Python process from start to end."""
    command, environment = [sys.executable, *arguments], trials.environment()
    return trials.seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment), 1)[0]


def until_line(command: list, file: pathlib.Path, environment: dict, patience: float = 1800) -> float:
    """The time from starting `command` until `file` holds a whole line; the process is then ended."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    try:
        while not (file.exists() and b"\n" in file.read_bytes()):
            if process.poll() is not None:
                raise SystemExit(f"ended before its first step: {process.stderr.read().decode()[-500:]}")
            if time.perf_counter() - began > patience:
                raise SystemExit(f"no first step within {patience:g} s")
            time.sleep(0.005)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def first_step(scratch: pathlib.Path, name: str, cache: pathlib.Path) -> float:
    """The time to the first step of `aegis erase` on the world with this compilation cache."""
    environment = trials.environment(AEGIS_CACHE_DIR=str(cache))
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # would be used instead
    out = scratch / name
    return until_line([sys.executable, *ERASE, "--out", str(out)], out / "metrics.jsonl", environment)


def measure(rounds: int, scratch: pathlib.Path, *, steps: bool = True) -> dict[str, list[float]]:
    """{what: seconds, one per run}, in turn."""
    for arguments in QUICK.values():
        seconds(arguments)  # bytecode and page cache
    times: dict[str, list[float]] = {name: [] for name in QUICK}
    for number in range(rounds):
        for _ in range(QUICK_PER_ROUND):
            for name, arguments in QUICK.items():
                times[name].append(seconds(arguments))
        if steps:
            for kind in ("cold", "cached"):
                print(f"round {number + 1}/{rounds}: first step, {kind}", file=sys.stderr, flush=True)
                taken = first_step(scratch, f"{kind}{number}", scratch / f"cache{number}")
                times.setdefault(f"first step, {kind}", []).append(taken)
    return times


def text(times: dict[str, list[float]]) -> str:
    bare = trials.spread(times["python -c pass"])["median"]
    spreads = {name: trials.spread(values) for name, values in times.items()}
    rows = [[name, trials.shown(s, 3), f"{s['median'] / bare:.1f}", s["n"]] for name, s in spreads.items()]
    found = spreads["aegis --help"]["median"]
    verdict = "met" if found <= HELP_GOAL else "MISSED"
    lines = [
        trials.table(["process", "seconds", "x bare Python", "runs"], rows),
        "",
        f"goal `aegis --help` <= {HELP_GOAL} s: {verdict}",
    ]
    if "first step, cold" in spreads:
        pairs = zip(times["first step, cold"], times["first step, cached"])
        lines.append(f"cold / cached: {trials.shown(trials.spread([cold / cached for cold, cached in pairs]))}")
    return "\n".join(lines)


def main(argv) -> None:
    parser = trials.parser(__doc__, "startup_cpu.json", rounds=5)
    parser.add_argument("--no-steps", dest="steps", action="store_false", help="leave out the first steps")
    args = parser.parse_args(argv)
    about = trials.about()
    with tempfile.TemporaryDirectory() as scratch:
        times = measure(args.rounds, pathlib.Path(scratch), steps=args.steps)
    print(text(times))
    trials.write(
        args.out, {"about": about, "seconds": times, "spread": {k: trials.spread(v) for k, v in times.items()}}
    )
