"""Several values of the world out of one model at once, jointly, under attack: what goes, what stays, what it costs.

    python -m benchmarks together                            1, 4 and 8 values by every preset of PRESETS
    python -m benchmarks together --counts 4 --presets aegis+ --steps-a-value 500
    python -m benchmarks together --table                    measures nothing

AEGIS trains the values in turn, at the scale of configs/world.py, STEPS_A_VALUE steps for each where that is more than
for one; closed forms have their defaults. The first ATTACKED values are attacked as on the canvas (canvas.MEMBERS).
What `aegis compose` makes of erasures that were trained apart has a script of its own (composed.py).
"""

import dataclasses
import statistics

from benchmarks import canvas, cells, trials

RESULT = "together.jsonl"
VALUES = ("star", "red", "striped", "heart", "ring", "blue", "dotted", "moon")
COUNTS = (1, 4, 8)
PRESETS = ("aegis+", "speed", "uce")
STEPS_A_VALUE = 250
ATTACKED = 3
HOW = {"seed": 0, "evaluation_seed": 41, **canvas.SIZES, "members": sorted(canvas.MEMBERS)}


def grid(counts=COUNTS, presets=PRESETS, steps=STEPS_A_VALUE) -> list[dict]:
    """steps: of a value, where AEGIS trains them."""
    longer = {} if steps == STEPS_A_VALUE else {"steps_a_value": (steps,)}
    axes = cells.grid(concept=[",".join(VALUES[:count]) for count in counts], preset=presets, **longer)
    return [{**cell, **HOW, "of": canvas.digest_of(settings(cell), HOW["members"], "world")} for cell in axes]


def settings(cell: dict):
    """What a cell's erasure runs with."""
    from aegis_jax.run import config

    run = config.load("world", [("concepts", cell["concept"]), ("method", cell["preset"])])
    steps = max(run.erase.steps, cell.get("steps_a_value", STEPS_A_VALUE) * len(run.concepts))
    return run if run.erase.steps == 1 else config.merge(run, {"steps": steps})  # a closed form has one


def measure(cell: dict) -> dict:
    """Shares of images, means over the values and the worst of them; "each" attacked value has its own figures."""
    import aegis_jax
    from aegis_jax.evaluation import world

    run = settings(cell)
    result = aegis_jax.erase("world", config=run)
    concepts = [world.find(name) for name in run.concepts]
    found = world.measure_several(result.pipeline, concepts, n=cell["images"], seed=cell["evaluation_seed"])
    figures = {"kept": found["kept"], "steps": run.erase.steps}
    for kind in ("plain", "held_out"):
        shown = list(found[kind].values())
        figures |= {kind: statistics.fmean(shown), f"{kind}_worst": max(shown), f"{kind}_each": found[kind]}
    return figures | {"each": {c.value.name: attacked(result, c, cell) for c in concepts[:ATTACKED]}}


def attacked(result, concept, cell: dict) -> dict:
    """The attack's figures on one value."""
    from aegis_jax.attacks.family import family
    from aegis_jax.evaluation.attacked import attack_family

    members = {name: dataclasses.replace(m, steps=cell["attack_steps"]) for name, m in family(cell["members"]).items()}
    how = {"seed": cell["evaluation_seed"], "restarts": cell["restarts"], "n": cell["n"]}
    found = attack_family(result.original, result.pipeline, concept, members, **how)
    return {name: found[name]["rate"] for name in ("strongest", "worst_pick", "pick")} | {"attack": found}


HEAD = (
    "values", "by", "steps", "plain, mean / worst", "held-out, mean / worst", "kept",
    "attacked: mean of the strongest member", "worst member's pick", "attacker's pick",
)  # fmt: skip


def table(lines: list[dict]) -> str:
    """Markdown, in per cent of images; attacks: means over the attacked values, and each of them."""
    percent, rows = lambda share: f"{100 * share:.0f}", []
    for line in lines:
        cell, found = line["cell"], line["figures"]
        shown = [f"{percent(found[kind])} / {percent(found[f'{kind}_worst'])}" for kind in ("plain", "held_out")]
        rates = [[each[name] for each in found["each"].values()] for name in ("strongest", "worst_pick", "pick")]
        rates = [f"{percent(statistics.fmean(each))} ({', '.join(map(percent, each))})" for each in rates]
        count = cell["concept"].count(",") + 1
        rows.append([count, cell["preset"], found["steps"], *shown, percent(found["kept"]), *rates])
    return f"{canvas.canvas_table.provenance(lines)}\n\n{trials.table(HEAD, rows)}" if rows else "Nothing measured yet."


def main(argv: list[str]) -> None:
    from aegis_jax.erasure.presets import PRESETS as KNOWN

    options = trials.parser(__doc__, RESULT)
    options.add_argument(
        "--counts", nargs="+", type=int, default=COUNTS, choices=range(1, len(VALUES) + 1), metavar="N"
    )
    options.add_argument("--presets", nargs="+", default=PRESETS, choices=KNOWN, metavar="NAME")
    options.add_argument("--steps-a-value", type=int, default=STEPS_A_VALUE, help="of AEGIS (default: %(default)s)")
    options.add_argument("--table", action="store_true", help="measures nothing")
    given = options.parse_args(argv)
    wanted = grid(given.counts, given.presets, given.steps_a_value)
    if not given.table:
        cells.run(wanted, measure, given.out)
    keys = {cells.key(cell) for cell in wanted}
    print(table([line for line in cells.read(given.out) if cells.key(line["cell"]) in keys]))
