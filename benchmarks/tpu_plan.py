"""What the AEGIS step of SD 1.4 needs on one TPU v5e chip, from the TPU's compiler, on a machine without one.

    pip install libtpu==0.0.42 --no-deps
    python -m benchmarks tpu_plan --low-memory       # an hour on one core
    python -m benchmarks tpu_plan --width small      # minutes, few channels

The whole step runs abstractly once; every compiled program that it calls is then compiled for an absent chip, and the
compiler's own account of its memory is printed. Each result goes to the file as soon as it is known; a program that
the file already holds is not compiled again. Nothing runs: these are sizes, not times.
"""

import json
import os
import time
from importlib import metadata
from pathlib import Path

# Before jax looks for a TPU: no lock between compilers, no question to a metadata server that is not there.
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.extend.core import jaxpr_as_fun  # noqa: E402

from aegis_jax.erasure import trainable  # noqa: E402
from aegis_jax.erasure.aegis.config import EraseConfig  # noqa: E402
from aegis_jax.erasure.aegis.step import erase_step  # noqa: E402
from benchmarks import trials  # noqa: E402
from benchmarks.abstract_sd import WIDTHS, abstract_run  # noqa: E402

BACKWARD = ("_update", "sign_step")  # compiled anew with `low_memory`
CHIP_GIB = 15.75  # of a v5e's 16 GB, what a program may use
# Slow ones first; what the step calls besides is a few kilobytes.
PROGRAMS = ("_update", "sign_step", "fresh", "predicted", "_moved", "encoded")
# TFLOP of one UNet forward, batch 1, and of the programs' passes, counted from the layers (multiply-add = 2), SD 1.4.
F, F_AND_B_TEXT, F_AND_B, ENCODE = 0.8033, 1.6692, 2.4068, 0.0133
GUIDED_CALLS = 24.5 * 2  # of a fresh latent, on average


def programs(state, frozen, config: EraseConfig) -> dict:
    """{key: (equation of the step's jaxpr, calls)} of the distinct compiled programs, slow ones first."""
    step = jax.make_jaxpr(lambda state, frozen: erase_step(state, frozen, config))(state, frozen)
    found: dict = {}
    for equation in step.eqns:
        name = equation.params.get("name")
        if name in PROGRAMS:
            key = _key(name, equation, config)
            found[key] = (equation, found.get(key, (None, 0))[1] + 1)
    return dict(sorted(found.items(), key=lambda item: PROGRAMS.index(_name(item[0]))))


def _key(name: str, equation, config: EraseConfig) -> str:
    """Name and whatever of the settings changes the program, so that results of several settings share a file."""
    parts = [name]
    if name == "predicted":
        parts.append(f"batch {equation.outvars[0].aval.shape[0]}")
    if name in BACKWARD:
        parts.append(memory(config.low_memory))
    return ", ".join(parts)


def memory(low: bool) -> str:
    return "low memory" if low else "usual memory"


def _name(key: str) -> str:
    return key.partition(",")[0]


def tflop(key: str) -> float:
    """Analytic count for SD 1.4, batch 1."""
    again = F if ", low" in key else 0.0
    return {
        "_update": F_AND_B + again,
        "sign_step": F_AND_B_TEXT + 3 * ENCODE + again,
        "fresh": GUIDED_CALLS * F,
        "predicted": F * (2 if "batch 2" in key else 1),
        "encoded": ENCODE,
        "_moved": 0.0,
    }[_name(key)]


def on(device, avals):
    """Abstract arguments that lie on an absent device."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in avals]


def compile_program(equation, device) -> dict:
    """Compiles one program of the step; bytes by the compiler's account, and seconds."""
    donated = tuple(i for i, given in enumerate(equation.params["donated_invars"]) if given)
    program = jax.jit(jaxpr_as_fun(equation.params["jaxpr"]), donate_argnums=donated)
    start = time.perf_counter()
    lowered = program.lower(*on(device, [v.aval for v in equation.invars]))
    seconds = {"lower_s": round(time.perf_counter() - start, 1)}
    start = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    seconds["compile_s"] = round(time.perf_counter() - start, 1)
    return {
        "argument": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        **seconds,
    }


def resident(state, frozen, config: EraseConfig, device) -> dict:
    """Bytes of what lies in memory all along, padded as the chip pads them: an argument of a program that does nothing.

    working theta is resident from its first use in the step to its last.
    """
    theta = jax.eval_shape(
        lambda frozen, drift: trainable.add_drift(frozen.unet, drift, config.trainable, frozen.precise),
        *(frozen, state.drift),
    )
    parts = {
        "theta0": frozen.unet,
        "theta0 in float32": frozen.precise,
        "working theta": theta,
        "drift": state.drift,
        "moments": state.opt_state,
        "text encoder": frozen.text,
        "rest": (state.omega, state.conflict, state.v, state.p, state.latents, frozen.concept_emb, frozen.schedule),
    }
    nothing = jax.jit(lambda *leaves: 0, keep_unused=True)
    size = lambda tree: nothing.lower(*on(device, jax.tree.leaves(tree))).compile().memory_analysis()  # noqa: E731
    return {name: size(tree).argument_size_in_bytes for name, tree in parts.items()}


def peak(key: str, program: dict, resident: dict, code: int) -> int:
    """Bytes in use while a program runs: all that is resident, its temporaries and what it returns anew.

    The working theta is what `_moved` returns: it is not there before.
    """
    rest = sum(resident.values()) - (resident["working theta"] if _name(key) == "_moved" else 0)
    return rest + program["temp"] + program["output"] - program["alias"] + code


def summary(result: dict, setting: str) -> list[dict]:
    """One row for each known program of a setting (`memory`), with its peak."""
    wanted = lambda key: _name(key) not in BACKWARD or key.endswith(setting)  # noqa: E731
    known = {key: p for key, p in result["programs"].items() if wanted(key)}
    # Every program's code stays on the chip.
    code = sum(p["code"] for p in known.values())
    size = result["resident"].get(setting)
    rows = [{"program": key, **p, "peak": size and peak(key, p, size, code)} for key, p in known.items()]
    return sorted(rows, key=lambda row: PROGRAMS.index(_name(row["program"])))


def table(result: dict, setting: str) -> str:
    """The rows as Markdown, sizes in GiB."""
    gib = lambda n: f"{n / 2**30:.2f}"  # noqa: E731
    rows = summary(result, setting)
    size = result["resident"][setting]
    lines = [
        f"### {setting}",
        "",
        "Resident: " + ", ".join(f"{name} {gib(n)}" for name, n in size.items()) + f"; **{gib(sum(size.values()))}**.",
        "",
        "| Program | calls | argument | output | alias | temp | code | peak | TFLOP | compile s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        sizes = " | ".join(gib(row[k]) for k in ("argument", "output", "alias", "temp", "code", "peak"))
        lines.append(f"| {row['program']} | {row['calls']} | {sizes} | {row['tflop'] or ''} | {row['compile_s']} |")
    most = max(rows, key=lambda row: row["peak"], default=None)
    if most:
        lines += ["", f"Whole step: **{gib(most['peak'])} GiB** of {CHIP_GIB}, in {most['program']}."]
    return "\n".join(lines) + "\n"


def write(result: dict, out: Path) -> None:
    """JSON, and beside it Markdown with one table for each setting."""
    trials.write(out, result, say=False)
    tables = [table(result, setting) for setting in result["resident"] if summary(result, setting)]
    head = f"# {result['title']}\n\nGiB by the compiler's account; compiled, not run. {result['versions']}.\n\n"
    out.with_suffix(".md").write_text(head + "\n".join(tables))


def arguments(argv=None):
    parser = trials.parser(__doc__, "tpu_v5e_two_latents.json")
    parser.add_argument("--width", choices=sorted(WIDTHS), default="sd14")
    parser.add_argument("--low-memory", action="store_true", help="backward passes recompute, moments in bfloat16")
    parser.add_argument("--only", metavar="PROGRAM", help="compile only programs whose key contains this")
    parser.add_argument(
        "--effort",
        type=float,
        default=0.0,
        help="of the compiler, -1 to 1; -1 takes a sixth of the time and more memory",
    )
    args = parser.parse_args(argv)
    if args.width != "sd14" and args.out == parser.get_default("out"):
        args.out = args.out.with_stem(f"{args.out.stem}_{args.width}")
    return args


def _known(args) -> dict:
    """What the file holds already, or an empty result."""
    new = {
        "title": f"AEGIS step (paper, two latents) of {args.width}, all weights, batch 1, on one TPU v5e chip",
        "versions": f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}, effort {args.effort:g}",
        "resident": {},
        "programs": {},
    }
    if not args.out.exists():
        return new
    old = json.loads(args.out.read_text())
    for key in ("title", "versions"):
        if old[key] != new[key]:
            raise SystemExit(f"{args.out} holds {old[key]!r}, not {new[key]!r}; give another file")
    return old


def main(argv) -> dict:
    args = arguments(argv)
    config, setting = EraseConfig(compute_dtype="bfloat16", low_memory=args.low_memory), memory(args.low_memory)
    result = _known(args)
    jax.config.update("jax_exec_time_optimization_effort", args.effort)
    device = topologies.get_topology_desc("v5e:1x1", platform="tpu", chips_per_host_bounds=(1, 1, 1)).devices[0]
    state, frozen = abstract_run(args.width, config)
    result["resident"][setting] = resident(state, frozen, config, device)
    for key, (equation, calls) in programs(state, frozen, config).items():
        if key in result["programs"] or (args.only and args.only not in key):
            continue
        print(f"compiling {key}", flush=True)
        measured = compile_program(equation, device)
        counted = round(tflop(key), 3) if args.width == "sd14" else None
        result["programs"][key] = {"calls": calls, **measured, "tflop": counted}
        write(result, args.out)
        print(f"  {measured}", flush=True)
    print(table(result, setting))
    return result
