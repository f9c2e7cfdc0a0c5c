"""What erasures of SD 1.4 and 2.1 need and cost on chips that are not there: the table of docs/plan.md.

    python -m benchmarks plan_table [--models sd14] [--trainable full,kv]

From shapes alone, on any machine, minutes for each model and set of weights; nothing is compiled and nothing runs.
Every row says what of it is an estimate and what an assumption. Results go to the file as they come, and what the file
holds already, of the same settings, versions and planner, is not computed again.
"""

import hashlib
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax looks for a device: none is needed

import dataclasses  # noqa: E402

from aegis_jax.plan import cost, plan, shapes  # noqa: E402
from aegis_jax.plan.chips import GIB, topology  # noqa: E402
from aegis_jax.run import config as run_config  # noqa: E402
from benchmarks import trials  # noqa: E402

TOPOLOGIES = ["v5e:1", "v5e:8", "v5e:64", "v5e:256", "v6e:1", "v5p:4", "h100:1"]
CONCEPTS = 1000
# What the table is of: the preset `paper` at the paper's scale, with backward passes that recompute.
SETTINGS = {"low_memory": True, "compute_dtype": "bfloat16", "concepts": ["concept"]}


def rows(found: plan.Facts) -> list[dict]:
    """One for each topology, with the most lanes that fit (at most 16, beyond which little is gained)."""
    result = []
    for name in TOPOLOGIES:
        there = topology(name)
        most = found.most_lanes(there.chip.memory)
        row = {"topology": name, "most lanes (estimate)": most}
        if most:
            lanes = min(most, 16)
            bill = cost.bill(found.flops.total, found.run, there, lanes, CONCEPTS, None)
            row |= {"lanes": lanes, "peak GiB (estimate)": round(found.peak(lanes) / GIB, 2)}
            row |= {f"{key} (by assumed share)": value for key, value in dataclasses.asdict(bill).items()}
        result.append(row)
    return result


def facts(model: str, trainable: str) -> dict:
    run = run_config.merge(run_config.RunConfig(), SETTINGS | {"trainable": trainable})
    found = plan.facts(shapes.pipeline(model), run)
    counts = [1] + [8] * (found.together is not None)
    return {
        "flops of a step (counted)": dataclasses.asdict(found.flops) | {"total": found.flops.total},
        "phases (estimate)": {
            f"K={k}": [{"phase": p.name, "during": p.during, "bytes": p.bytes(k)} for p in found.phases(k)]
            for k in counts
        },
        "fits on": {f"K={k}": plan.fitting(found, k) for k in counts},
        "rows": rows(found),
    }


def markdown(result: dict) -> str:
    lines = [
        "| model | trained | phase | GiB at K=1 | largest parts |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, found in result["facts"].items():
        for phase in found["phases (estimate)"]["K=1"]:
            parts = sorted(phase["bytes"].items(), key=lambda item: -item[1])[:4]
            named = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
            total = sum(phase["bytes"].values()) / GIB
            lines.append(f"| {' | '.join(key.split())} | {phase['phase']} | {total:.2f} | {named} |")
    lines += [
        "",
        "| model | trained | TFLOP a step | topology | most K | K | peak GiB | share of peak | concepts per chip-hour "
        f"| hours for {CONCEPTS:,} | chip-hours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, found in result["facts"].items():
        flops = found["flops of a step (counted)"]["total"] / 1e12
        for row in found["rows"]:
            first = f"| {' | '.join(key.split())} | {flops:.1f} | {row['topology']} | {row['most lanes (estimate)']} "
            if "lanes" not in row:
                lines.append(first + "| | | | | | |")
                continue
            of = lambda name, row=row: row[f"{name} (by assumed share)"]  # noqa: E731
            lines.append(
                first + f"| {row['lanes']} | {row['peak GiB (estimate)']:.2f} | {of('share'):.0%} "
                f"| {of('concepts_per_hour'):.2f} | {of('hours'):.1f} | {of('chip_hours'):.0f} |"
            )
    return "\n".join(lines) + "\n"


def main(argv) -> dict:
    parser = trials.parser(__doc__, "plan.json")
    parser.add_argument("--models", default="sd14,sd21")
    parser.add_argument("--trainable", default="full,xattn,kv")
    args = parser.parse_args(argv)
    result = _known(args.out)
    for model in args.models.split(","):
        for trainable in args.trainable.split(","):
            key = f"{model} {trainable}"
            if key not in result["facts"]:
                result["facts"][key] = facts(model, trainable)
            trials.write(args.out, result, say=False)
    print(markdown(result))
    return result


def _code() -> str:
    """A hash of the planner's own files."""
    files = sorted(pathlib.Path(plan.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def _known(out) -> dict:
    """What the file holds already, or an empty result."""
    new = {"settings": SETTINGS, "versions": plan.versions(), "assumed share of peak": cost.MEASURED, "facts": {}}
    new = json.loads(json.dumps(new | {"code": _code()}))
    old = json.loads(out.read_text()) if out.exists() else {}
    same = all(old.get(key) == new[key] for key in new if key != "facts")
    return (new | {"facts": old["facts"]} if same else new) | {"about": trials.about()}
