"""What `aegis plan` prints. Every row says where its number is from: estimate (from shapes), compiled (by the TPU's
compiler), counted (from shapes, exactly), assumed, given (by the user)."""

import dataclasses
import json
import sys

import jax

from aegis_jax.errors import AegisError
from aegis_jax.plan import compiled, cost, plan, shapes, stable_diffusion
from aegis_jax.plan.chips import GIB, topology
from aegis_jax.run import config as run_config

MOST_CONCEPTS = 10**9  # that are priced


def report(
    model: str | None, concepts: list[str] | None, *, config=None, overrides=(), topology_name: str, lanes: int = 1,
    count: int = 1, price: float | None = None, share: float | None = None, compile: bool = False,
) -> dict:  # fmt: skip
    """The plan of a run on a topology, as JSON has it.

    model, concepts, config, overrides: as for `aegis_jax.erase`, and sd14 or sd21, of which no weights are needed.
    lanes: runs that share a chip. count: concepts to erase, one a run; price: dollars per chip-hour; share: of the
    chip's peak, by default assumed. compile: the step's memory by the TPU's compiler, where libtpu is installed.

    Raises `AegisError` for bad input.
    """
    for name, value, most in (("lanes", lanes, plan.MOST_LANES), ("concepts", count, MOST_CONCEPTS)):
        if not 1 <= value <= most:
            raise AegisError(f"--{name} {value}: wanted 1 to {most}")
    if price is not None and not 0 <= price < float("inf"):
        raise AegisError(f"--price {price}: wanted dollars per chip-hour, 0 or more")
    if share is not None and not 0 < share <= 1:
        raise AegisError(f"--utilisation {share}: wanted a share of the peak, more than 0 and at most 1")
    there = topology(topology_name)
    run, pipeline = _run(model, concepts, config, overrides)
    if lanes > 1 and (reason := plan.refused(run)):
        raise AegisError(f"--lanes {lanes}: {reason}")
    found = plan.facts(pipeline, run)
    phases, notes, programs, collectives = found.phases(lanes), [], [], None
    if compile:
        refused = _not_compiled(there)
        if refused:
            notes.append(refused)
        else:
            say = lambda text: print(f"aegis: {text}", file=sys.stderr, flush=True)  # noqa: E731
            own = plan.compiled_step(pipeline, run, there.chip.name, lanes, say)
            phases = [own["phase"] if phase.name == "step" else phase for phase in phases]
            programs, collectives = own["programs"], own["collectives"]
    rows = [
        {"phase": p.name, "during": p.during, "how": p.how, "bytes": p.bytes(lanes), "total": p.total(lanes)}
        for p in phases
    ]
    peak = max(row["total"] for row in rows)
    bill = cost.bill(found.flops.total, found.run, there, lanes, count, price, share)
    return {
        "model": run.model, "settings": run_config.values(found.run), "topology": there.name, "lanes": lanes,
        "usable_bytes": there.chip.memory, "phases": rows, "peak_bytes": peak, "fits": peak <= there.chip.memory,
        "most_lanes": found.most_lanes(there.chip.memory), "lanes_refused": plan.refused(found.run),
        "fits_on": plan.fitting(found, lanes),
        "flops": dataclasses.asdict(found.flops) | {"total": found.flops.total},
        "collectives": collectives, "programs": programs, "bill": bill and dataclasses.asdict(bill),
        "bill_refused": cost.unknown(found.run, there, share),
        "price": price, "share_given": share is not None, "notes": notes,
        "versions": {"jax": jax.__version__} | ({"libtpu": compiled.version()} if programs else {}),
    }  # fmt: skip


def _run(model, concepts, config, overrides):
    """(settings, pipeline of shapes)."""
    if config is None:  # our configs of these names say how their models are trained
        config = model if model in (*stable_diffusion.MODELS, "world") else None
    given = {"concepts": concepts} if concepts else {}
    if model is not None and model not in stable_diffusion.MODELS:
        given["model"] = model
    run = run_config.merge(run_config.load(config), given, overrides)
    known = {run_config.load(name).model: name for name in stable_diffusion.MODELS}
    name = model if model in stable_diffusion.MODELS else known.get(run.model, run.model)
    if not name:
        raise AegisError("no model given: name sd14, sd21, a diffusers folder, a hub id or world")
    if name in stable_diffusion.MODELS:
        return dataclasses.replace(run, model=name), shapes.pipeline(name)
    return run, shapes.pipeline(name, revision=run.revision or None, variant=run.variant or None)


def _not_compiled(there) -> str | None:
    if there.chip.kind != "tpu":
        return f"{there.name} is no TPU, whose compiler alone works without the device: the step is an estimate"
    if not compiled.available():
        return "libtpu is not installed (pip install 'aegis_jax[plan]'): the step is an estimate"
    return None


def text(found: dict) -> str:
    """The same for a terminal."""
    gib = lambda n: f"{n / GIB:.2f}"  # noqa: E731
    own = found["settings"]
    title = f"{found['model']}, {own['method']}, {own['trainable']}, {own['steps']} steps of {own['batch']}, "
    lines = [title + f"K = {found['lanes']} on each chip of {found['topology']}", ""]
    lines += [f"note: {note}" for note in found["notes"]]
    lines.append(f"{'phase':12}{'GiB':>7}  {'how':10}what")
    for row in found["phases"]:
        parts = sorted(row["bytes"].items(), key=lambda item: -item[1])
        said = ", ".join(f"{name} {gib(size)}" for name, size in parts if size >= GIB / 100)
        lines.append(f"{row['phase']:12}{gib(row['total']):>7}  {row['how']:10}{row['during']}: {said}")
    usable, verdict = gib(found["usable_bytes"]), "fits" if found["fits"] else "does not fit"
    lines += [
        "",
        f"memory       {verdict}: {gib(found['peak_bytes'])} of {usable} GiB that a program may use (published)",
        f"most lanes   {found['most_lanes']}{' or more' * (found['most_lanes'] == plan.MOST_LANES)} (estimate)"
        + _why(found["lanes_refused"]),
        f"smallest     {', '.join(found['fits_on']) or 'none known'} (estimate)",
        f"arithmetic   {found['flops']['total'] / 1e12:.4g} TFLOP a step of one run (counted; sampling "
        f"{found['flops']['sampling'] / 1e12:.4g}, on average)",
        "collectives  "
        + ("none: a run stays on its chip" if found["collectives"] is None else f"{found['collectives']} (compiled)"),
    ]
    return "\n".join(lines + _money(found)) + "\n"


def _why(refused: str | None) -> str:
    return f"; {refused}" if refused else ""


def _money(found: dict) -> list[str]:
    bill = found["bill"]
    if bill is None:
        return [f"time         not known: {found['bill_refused']}"]
    source = "given" if found["share_given"] else "assumed: SD 1.4's forward pass on one H200, docs/plan.md"
    lines = [
        f"utilisation  {bill['share']:.0%} of the chip's bfloat16 peak ({source})",
        f"speed        {bill['steps_per_hour']:,.0f} steps, {bill['concepts_per_hour']:.3g} concepts per chip-hour "
        "(by that share)",
        f"time         {bill['concepts']:,} concept(s): {bill['hours']:.3g} h, {bill['chip_hours']:.4g} chip-hours "
        "(by that share; without start, compilation, export and pictures)",
    ]
    if bill["dollars"] is not None:
        lines.append(f"cost         ${bill['dollars']:,.2f} at ${found['price']:g} per chip-hour (given)")
    return lines


def to_json(found: dict) -> str:
    return json.dumps(found, indent=1)
