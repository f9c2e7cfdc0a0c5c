"""The AEGIS training step, faithful mode: aegis_jax against PyTorch as published (p1) and tuned (p2), side by side.

  python -m benchmarks step_vs_pytorch --model world
  python -m benchmarks step_vs_pytorch --model quarter --stops 4
  python -m benchmarks step_vs_pytorch --model sd14 --cache DIR --against p1,p2-cudagraph --stops 10
  python -m benchmarks step_vs_pytorch --model sd14 --cache DIR --against p2-reduce-overhead,p2-max-autotune

Same weights, prompts, z_T, t and stop indices on every side, the same stop for a step's two latents; preset `paper`
but that v and p are kept. First a gate: a step at a state with drift must agree (step/agreement.py), or nothing is
timed. Then each side runs in a process of its own, twice, in the order A B A B; every stop index once after warm-up;
wall-clock with the device synchronised. Prints a Markdown table.

p2 with bfloat16 keeps a bfloat16 working copy beside the float32 drift, as aegis_jax does, which is cheaper than
autocast's casts at every call. TF32 follows --tf32 (on with bfloat16 on a GPU) on all sides, p1 included.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import cases, trials
from benchmarks.trials import ROOT

# performance.md 1.1: analytic counts of SD 1.4 at 64x64, the ones that are published.
SD14_FLOPS = {"F": 803.3e9, "F+B_text": 1669.2e9, "F+B": 2406.8e9}


def options(arguments=None) -> argparse.Namespace:
    parser = trials.parser(__doc__, "step_MODEL_DEVICE.json", rounds=2)
    parser.set_defaults(out=None)
    parser.add_argument("--model", choices=cases.MODELS, default="world")
    parser.add_argument("--size", type=int, help="side of the latents, for the random models")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where nvidia-smi answers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument(
        "--against",
        help="p1, p2, p2-cudagraph, p2-default, p2-reduce-overhead, p2-max-autotune, with commas (default p1,p2)",
    )
    parser.add_argument("--compile", action="store_true", help="adds the compiled variants of p2")
    parser.add_argument(
        "--stops", type=int, help="stop indices, evenly spaced over 0..49 (default 50 on a GPU, else 10)"
    )
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, help="float32 products in TF32, all sides")
    parser.add_argument("--peak", type=float, help="TFLOP/s of this machine, for the share of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=pathlib.Path, help="keep compiled programs here (default: a new empty folder)")
    parser.add_argument("--timeout", type=float, default=540, help="seconds for one process")
    parser.add_argument("--gate-only", action="store_true")
    args = parser.parse_args(arguments)
    args.device = args.device or ("cuda" if _has_gpu() else "cpu")
    on_gpu = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.stops = args.stops or (50 if on_gpu else 10)
    args.tf32 = args.dtype == "bfloat16" if args.tf32 is None else args.tf32
    sides = args.against.split(",") if args.against else ["p1", "p2"]
    if args.compile:
        sides += ["p2-reduce-overhead", "p2-max-autotune"] if on_gpu else ["p2-default"]
    args.sides = ["jax", *sides]
    args.out = args.out or trials.RESULTS / f"step_{args.model}_{args.device}.json"
    return args


def _has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def work(args, side: str, task: str, scratch: pathlib.Path) -> dict:
    """Runs a worker and returns its result; {"failed": why} if there is none."""
    result = scratch / f"{side}-{task}.json"
    result.unlink(missing_ok=True)
    caches = args.cache or scratch
    keys = ("model", "size", "batch", "device", "dtype", "warmup", "threads", "tf32", "seed")
    spec = {key: getattr(args, key) for key in keys}
    spec |= {"side": side, "task": task, "stops": cases.stops(args.stops), "scratch": str(scratch)}
    spec |= {"result": str(result), "jax_cache": str(caches / "jax")}
    file = scratch / "spec.json"
    file.write_text(json.dumps(spec))
    environment = trials.environment() | {
        "JAX_PLATFORMS": "cpu" if args.device == "cpu" else "cuda",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "OMP_NUM_THREADS": str(args.threads),
        "MKL_NUM_THREADS": str(args.threads),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    print(f"{datetime.datetime.now():%H:%M:%S} {side}: {task}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.step.worker", str(file)]
    try:
        code = subprocess.run(command, env=environment, cwd=ROOT, timeout=args.timeout, stdout=sys.stderr).returncode
    except subprocess.TimeoutExpired:
        return {"failed": f"did not finish within {args.timeout:.0f} s"}
    found = json.loads(result.read_text()) if result.exists() else {"failed": f"the process ended with code {code}"}
    print(f"{datetime.datetime.now():%H:%M:%S} {side}: {_told(found)}", file=sys.stderr, flush=True)
    return found


def _told(found: dict) -> str:
    """A worker's result in a line, for whoever waits for the rest."""
    if "steps" in found:
        mean = np.mean([step["seconds"] for step in found["steps"]])
        return f"{1e3 * mean:.1f} ms a step, first step {found['first step']:.1f} s, set up in {found['setup_s']:.1f} s"
    return json.dumps({key: x for key, x in found.items() if key != "flops"})


def agree(args, scratch) -> dict:
    """The gate's results by side; SystemExit where a side disagrees. A compiled side that fails is dropped."""
    results = {}
    for side in list(args.sides):
        result = results[side] = work(args, side, "gate", scratch)
        if "failed" in result:
            if side.startswith("p2-"):
                print(f"{side} does not run here and is left out: {result['failed']}", file=sys.stderr)
                args.sides.remove(side)
                continue
            sys.exit(f"{side}: the agreement gate could not run: {result['failed']}")
        if result.get("problems"):
            sys.exit(f"{side} and jax disagree, nothing was timed: " + "; ".join(result["problems"]))
    if len({result["evaluations"]["count"] for result in results.values() if "evaluations" in result}) > 1:
        sys.exit(f"the sides do not evaluate the UNet equally often: {results}")
    return results


# --- the table --------------------------------------------------------------------------------------


def summary(args, runs: list[dict], gate: dict, flops: dict) -> dict:
    """One side's figures over all its runs."""
    from benchmarks.step.torch_step import step_flops

    seconds = np.array([step["seconds"] for run in runs for step in run["steps"]])
    stops = [step["s"] for run in runs for step in run["steps"]]
    work_done = np.mean([step_flops(flops, s, args.batch) for s in stops])
    phases = {}
    for run in runs:
        for row in run["phases"]:
            for phase in row.keys() - {"s"}:
                phases.setdefault(phase, []).append(row[phase])
    counted = gate["evaluations"]
    return {
        "mean_s": float(seconds.mean()),
        "run_means_s": [float(np.mean([step["seconds"] for step in run["steps"]])) for run in runs],
        "median_s": float(np.median(seconds)),
        "p10_s": float(np.percentile(seconds, 10)),
        "p90_s": float(np.percentile(seconds, 90)),
        "phases_s": {phase: float(np.mean(found)) for phase, found in phases.items()},
        "tflops": float(work_done / seconds.mean() / 1e12),
        # The core's evaluations, and two a denoising step of either latent.
        "evaluations_per_step": counted["count"] + 4 * args.batch * (float(np.mean(stops)) - counted["s"]),
        "counted": counted,
        "peak_bytes": max(run["memory"]["peak_device"] or run["memory"]["peak_rss"] for run in runs),
        "first_step_cold_s": gate.get("first step, cold"),
        "first_step_cached_s": runs[-1]["first step"],
        "about": runs[0]["about"],
    }


def table(args, found: dict) -> str:
    ours = found["jax"]
    unit = 1e3
    head = ["side", "ms per step: mean", "median", "10-90 %", "1000 steps, s", "jax is faster by", "TFLOP/s"]
    head += ["UNet evaluations per step", "per s", "peak memory, GiB", "first step, s: cold", "cached"]
    rows = []
    for side, x in found.items():
        share = f" ({x['tflops'] / args.peak:.1%})" if args.peak else ""
        cells = [side, f"{x['mean_s'] * unit:.1f}", f"{x['median_s'] * unit:.1f}"]
        cells += [f"{x['p10_s'] * unit:.1f} - {x['p90_s'] * unit:.1f}", f"{x['mean_s'] * 1000:.1f}"]
        cells += [f"{x['mean_s'] / ours['mean_s']:.2f}x", f"{x['tflops']:.3g}{share}"]
        cells += [f"{x['evaluations_per_step']:.1f}", f"{x['evaluations_per_step'] / x['mean_s']:.1f}"]
        cells += [f"{x['peak_bytes'] / 2**30:.2f}", f"{x['first_step_cold_s']:.1f}", f"{x['first_step_cached_s']:.1f}"]
        rows.append(cells)
    phases = list(dict.fromkeys(phase for x in found.values() for phase in x["phases_s"]))
    by_phase = [
        [side, *(f"{x['phases_s'][phase] * unit:.1f}" if phase in x["phases_s"] else "-" for phase in phases)]
        for side, x in found.items()
    ]
    note = "Mean ms by phase, each waited for (a few stops only, so they do not add up to the step's mean):"
    return "\n\n".join([trials.table(head, rows), note, trials.table(["side", *phases], by_phase)])


def heading(args, found: dict, gates: dict) -> str:
    device = {x["about"]["device"] for x in found.values()}
    lines = [
        f"{args.model}, batch {args.batch}, {args.dtype}, {args.threads} threads, {' / '.join(sorted(device))}, "
        f"{platform.processor() or platform.machine()}; stops {cases.stops(args.stops)}; order "
        f"{' '.join(found)} x {args.rounds}; means of the rounds in ms: "
        + "; ".join(f"{side} {', '.join(f'{1e3 * s:.1f}' for s in x['run_means_s'])}" for side, x in found.items())
    ]
    lines += [f"- {side}: {x['about']}" for side, x in found.items()]
    for side, gate in gates.items():
        if "agreement" in gate:
            lines.append(f"- gate, {side}: " + "; ".join(f"{k} {v:.2g}" for k, v in gate["agreement"].items()))
        if "failed" in gate:
            lines.append(f"- {side} failed: {gate['failed']}")
    return "\n".join(lines)


def main(argv) -> None:
    args, about = options(argv), trials.about()
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        gates = agree(args, scratch)
        runs: dict[str, list[dict]] = {side: [] for side in args.sides}
        for _ in range(0 if args.gate_only else args.rounds):
            for side in args.sides:
                runs[side].append(work(args, side, "time", scratch))
    for side, results in runs.items():
        failed = [run["failed"] for run in results if "failed" in run]
        if failed and side == "jax":
            sys.exit(f"{side}: {failed[0]}")
        if failed:
            gates[side]["failed"] = failed[0]
    counted = next((gate["flops"] for gate in gates.values() if "flops" in gate), None)
    flops = SD14_FLOPS if args.model == "sd14" and args.size in (None, 64) else counted
    good = {side: r for side, r in runs.items() if r and "failed" not in gates[side]}
    found = {side: summary(args, r, gates[side], flops) for side, r in good.items()}
    if found:
        print(heading(args, found, gates) + "\n\n" + table(args, found))
    else:
        print(json.dumps(gates, indent=1))
    record = {"options": {k: str(v) for k, v in vars(args).items()}, "about": about, "gates": gates, "flops": flops}
    record |= {"flops_counted": counted, "runs": runs, "summary": found}
    trials.write(args.out, record)
