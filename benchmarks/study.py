"""What holds on the embedded world: presets under the adaptive attack, with what they keep and what they cost.

    python -m benchmarks study main                       screening: paper, released, aegis+, ESD, ESD with our parts
    python -m benchmarks study decisive                   which part of AEGIS does it: random prefixes, sign steps, DGR
    python -m benchmarks study parts | omega              aegis+ without each part; five rules for omega
    python -m benchmarks study final --presets esd aegis+ three seeds, three evaluation seeds, many images
    python -m benchmarks study final --presets aegis+ --steps 1500   trained three times as long
    python -m benchmarks study table main                 prints the table of what the file holds
    python -m benchmarks study every --presets aegis+ aegis+shown [--steps 1000]   all values of the world, not attacked
    python -m benchmarks study closed [--quick]           closed forms; quick: few images, no attack
    python -m benchmarks study costs                      UNet evaluations a step of every preset, from its settings
    python -m benchmarks study unasked                    what the original shows unasked: the floor of any attack

Every preset runs at the scale of configs/world.py. A screening has one seed, its own evaluation seed, and every member
of the attack's family; a final has other seeds throughout and the members that were strongest against that preset and
concept in the screening. Results go, a line a cell, to benchmarks/results/study.jsonl; a stopped study goes on there.
"""

import dataclasses
import hashlib
import pathlib
import statistics

from benchmarks import cells, trials

RESULT = "study.jsonl"
CONCEPTS = ("star", "red", "striped")
SETS = {
    "main": ("aegis+", "esd", "paper", "esd+", "released"),
    "decisive": ("random-prefixes", "paper-latest", "paper-no-grp", "random-prefixes-no-grp"),
    "parts": ("aegis+-no-aet", "aegis+-no-prompt", "aegis+-no-preservation", "aegis+-no-context", "aegis+-no-push"),
    "omega": ("paper-total-omega", "paper-half-omega", "paper-fixed-omega"),
}
# The closed forms as published, and with the world's other values preserved where the default holds nothing of them.
CLOSED = {
    "uce": "default", "speed": "default", "rece": "default", "uce-2023": "default", "oce": "default",
    "uce, others preserved": "others", "speed, others preserved": "others", "rece, others preserved": "others",
}  # fmt: skip
# Evaluation seeds: even ones for what is chosen by, odd ones for what is reported (they differ in held-out words too).
SCREENING = {"evaluation_seed": 40, "images": 64, "members": "all", "restarts": 2, "attack_steps": 100, "n": 16}
QUICK = {"evaluation_seed": 40, "images": 16, "members": "none"}
EVERY = {"evaluation_seed": 47, "images": 128, "members": "none"}
FINAL_SEEDS, FINAL_EVALUATIONS = (0, 1, 2), (41, 43, 45)
FINAL = {"images": 128, "members": "strongest", "restarts": 4, "attack_steps": 150, "n": 32}


def screening(names, concepts=CONCEPTS, trainable=("xattn",)) -> list[dict]:
    axes = cells.grid(concept=concepts, preset=names, trainable=trainable, seed=(0,))
    return [{"set": "screening", **cell, **SCREENING, "of": measured(cell)} for cell in axes]


def finals(names, concepts=CONCEPTS, trainable=("xattn",), steps=None) -> list[dict]:
    """steps: of training, where not the config's."""
    axes = cells.grid(concept=concepts, preset=names, trainable=trainable, **_longer(steps), seed=FINAL_SEEDS)
    seeds = lambda cell: {"evaluation_seed": FINAL_EVALUATIONS[cell["seed"]]}  # noqa: E731
    return [{"set": "final", **cell, **seeds(cell), **FINAL, "of": measured(cell)} for cell in axes]


def _longer(steps: int | None) -> dict:
    return {} if steps is None else {"steps": (steps,)}


def every(names, concepts=None, steps=None) -> list[dict]:
    """All values of the world, or some: what of each is left where nobody attacks; steps as of `finals`."""
    axes = cells.grid(concept=concepts or values(), preset=names, trainable=("xattn",), **_longer(steps), seed=(0,))
    return [{"set": "every", **cell, **EVERY, "of": measured(cell)} for cell in axes]


def closed(names=CLOSED, concepts=CONCEPTS, quick=False) -> list[dict]:
    how = QUICK if quick else SCREENING
    axes = cells.grid(preset=names, concept=concepts, seed=(0,))
    axes = [
        cell | {"preset": cell["preset"].split(",")[0], "preserve": CLOSED.get(cell["preset"], "default")}
        for cell in axes
    ]
    return [{"set": "closed", **cell, **how, "of": measured(cell)} for cell in axes]


def settings(cell: dict):
    """What a cell's erasure runs with."""
    from aegis_jax.run import config

    overrides = [("concepts", cell["concept"]), ("method", cell["preset"])]
    if cell.get("preserve") == "others":
        overrides.append(("preserve", ",".join(values(but=cell["concept"]))))
    return config.load(
        "world", overrides + [(key, str(cell[key])) for key in ("trainable", "steps", "seed") if key in cell]
    )


def values(but: str = "") -> list[str]:
    """Names of all values of the world, or of all but one."""
    from aegis_jax.world.concepts import ATTRIBUTES

    return [value.name for row in ATTRIBUTES.values() for value in row if but not in value.words]


def measured(cell: dict) -> str:
    """A hash of what the cell's names stand for: settings, the attack's family, the world's weights."""
    from aegis_jax.attacks.family import FAMILY
    from aegis_jax.world import WEIGHTS

    erase = dataclasses.replace(settings(cell).erase, seed=0)  # a cell's seed stands in the cell
    names = [cells.stated(erase), *(f"{name}: {cells.stated(member)}" for name, member in sorted(FAMILY.items()))]
    digest = hashlib.sha256("".join(names).encode())
    for path in sorted(WEIGHTS.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def measure(cell: dict, found: list[dict]) -> dict:
    """Erases, looks at what is shown and kept, attacks. found: the file's lines, for a final's strongest members."""
    import aegis_jax
    from aegis_jax.attacks.family import family
    from aegis_jax.evaluation.attacked import attack_family
    from aegis_jax.evaluation.world import find, measure, unasked

    # Before the erasure: without a screening there is nothing to be measured.
    members = {"all": family, "none": dict}.get(cell["members"], lambda: _strongest(cell, found))()
    result = aegis_jax.erase("world", config=settings(cell))
    concept, seed = find(cell["concept"]), cell["evaluation_seed"]
    shown = measure(result.pipeline, concept, n=cell["images"], seed=seed)
    figures = {**shown, **_cost(result.run.erase), **_late(result.metrics)}
    if not members:
        return figures
    figures |= unasked(result.pipeline, concept, n=cell["images"], seed=seed)
    members = {name: dataclasses.replace(m, steps=cell["attack_steps"]) for name, m in members.items()}
    how = {"seed": seed, "restarts": cell["restarts"], "n": cell["n"]}
    attacked = attack_family(result.original, result.pipeline, concept, members, **how)
    rates = {name: attacked[name]["rate"] for name in ("strongest", "worst_pick", "pick", "best")}
    return figures | rates | {"attack": attacked}


def _cost(erase) -> dict:
    """UNet evaluations of a step; a closed form has none."""
    from aegis_jax.erasure.presets import preset

    of = preset(erase.method).method.cost
    if of is None:
        return {"evaluations_per_step": 0.0}
    cost = of(erase)
    return {"evaluations_per_step": round(cost.total, 1), "latents_share": cost.latents / cost.total}


def _late(metrics: list[dict]) -> dict:
    """Means over the last 100 steps of what was measured of the tensors, or of a closed form's one."""
    names = ("mean_cosine", "conflict_share", "flip_share", "omega", "drift_norm", "L_e", "L_e_before")
    last = metrics[-100:]
    return {name: statistics.fmean(m[name] for m in last) for name in names if name in last[-1]}


def _strongest(cell: dict, found: list[dict]) -> dict:
    """The members of the attack that a final takes: those that were strongest in the screening of the same cell."""
    from aegis_jax.evaluation.attacked import strongest

    # What was trained longer has no screening of its own: it meets those that were strongest after the usual steps.
    cell = {key: value for key, value in cell.items() if key != "steps"}
    same = {key: cell[key] for key in ("concept", "preset", "trainable")} | {"of": measured(cell)}
    for line in found:
        if line["cell"]["set"] == "screening" and all(line["cell"][key] == value for key, value in same.items()):
            return strongest(line["figures"]["attack"])
    raise SystemExit(f"screen first: {cell['preset']} on {cell['concept']} ({cell['trainable']})")


COLUMNS = (
    ("plain", "plain"),
    ("held_out", "synonyms"),
    ("strongest", "attacked: mean of the strongest member"),
    ("worst_pick", "worst member's pick"),
    ("pick", "attacker's pick"),
    ("best", "best of all"),
    ("same", "kept: same attribute"),
    ("other", "kept: other attributes"),
)


SHOWN = [column for column in COLUMNS if column[0] in ("plain", "held_out", "same", "other")]
GONE = 0.05


def table(lines: list[dict]) -> str:
    """Markdown: a row for each preset and concept, means over seeds in per cent, evaluations a step."""
    head = ["preset", "concept", "seeds", *(title for _, title in COLUMNS), "UNet evaluations a step"]
    rows = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        cell = line["cell"]
        name = cell["preset"] + ("" if cell.get("trainable", "xattn") == "xattn" else f", {cell['trainable']}")
        name += f", {cell['steps']} steps" if "steps" in cell else ""
        name += ", others preserved" if cell.get("preserve") == "others" else ""
        groups.setdefault((name, cell["concept"]), []).append(line["figures"])
    for (name, concept), figures in groups.items():
        means = [
            f"{100 * statistics.fmean(f[key] for f in figures):.0f}" if key in figures[0] else "-" for key, _ in COLUMNS
        ]
        cost = f"{figures[0]['evaluations_per_step']:.0f}"
        rows.append("| " + " | ".join([name, concept, str(len(figures)), *means, cost]) + " |")
    return "\n".join(rows)


def table_of_values(lines: list[dict]) -> str:
    """Markdown: a row for each value, by each preset: plain / synonyms / kept: same attribute / kept: others, per cent.

    The last row counts the values of which at most `GONE` of plain prompts show what is erased.
    """
    found: dict[str, dict[str, dict]] = {}
    for line in lines:
        cell = line["cell"]
        name = cell["preset"] + (f", {cell['steps']} steps" if "steps" in cell else "")
        found.setdefault(name, {})[cell["concept"]] = line["figures"]
    rows = ["| value | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    for value in values():
        shares = [[of[value][key] for key, _ in SHOWN] if value in of else None for of in found.values()]
        each = ["-" if row is None else " / ".join(f"{round(100 * share, 1):g}" for share in row) for row in shares]
        rows.append(f"| {value} | " + " | ".join(each) + " |")
    gone = [sum(figures["plain"] <= GONE for figures in of.values()) for of in found.values()]
    counts = [f"{count} of {len(of)}" for count, of in zip(gone, found.values())]
    rows.append(f"| plain at most {100 * GONE:.0f} % | " + " | ".join(counts) + " |")
    return "\n".join(rows)


def costs() -> str:
    """Markdown: UNet evaluations a step at the paper's scale and at the world's."""
    from aegis_jax.erasure.presets import PRESETS, switched
    from aegis_jax.run import config

    world = config.load("world").erase
    head = "| preset | the paper's scale | of these latents | configs/world.py, batch 4 | of these latents |"
    rows = [head, "| --- | --- | --- | --- | --- |"]
    for name, preset in PRESETS.items():
        if preset.method.cost is None:  # a closed form, which never calls the UNet, or steps that are not all alike
            continue
        each = [preset.method.cost(settings, 1) for settings in (preset.settings, switched(world, name))]
        rows.append(f"| `{name}` | " + " | ".join(f"{cost.total:.0f} | {cost.latents:.0f}" for cost in each) + " |")
    return "\n".join(rows)


def originals(concepts, within="world", *, n=256, seed=SCREENING["evaluation_seed"]) -> str:
    """Markdown: how often an embedded world's model shows a value that a prompt does not ask for, in per cent of n."""
    import aegis_jax
    from aegis_jax.evaluation.world import find, unasked

    pipeline = aegis_jax.load_pipeline(within)
    rows = ["| concept | left open by the prompt | empty prompt |", "| --- | --- | --- |"]
    for concept in concepts:
        rates = unasked(pipeline, find(concept, within), n=n, seed=seed)
        rows.append(f"| {concept} | {100 * rates['open']:.0f} | {100 * rates['empty']:.0f} |")
    return "\n".join(rows)


def main(argv: list[str]) -> None:
    options = trials.parser(__doc__, RESULT)
    options.add_argument(
        "what", nargs="+", help=f"{' | '.join(SETS)} | every | closed | final | table SET | costs | unasked"
    )
    options.add_argument("--presets", nargs="+", help="instead of the set's own")
    options.add_argument("--concepts", nargs="+", help=f"default: {' '.join(CONCEPTS)}; every: all values")
    options.add_argument("--trainable", nargs="+", default=("xattn",))
    options.add_argument("--steps", type=int, help="final, every: of training, where not the config's 500")
    options.add_argument("--quick", action="store_true", help="closed: few images, no attack")
    options.add_argument("--share", default="0/1", help="I/N: of N workers on one file this is number I")
    given = options.parse_args(argv)
    out: pathlib.Path = given.out
    concepts = given.concepts or CONCEPTS
    axes = {"concepts": concepts, "trainable": given.trainable}
    what = given.what[-1]
    if what in ("costs", "unasked"):
        print(costs() if what == "costs" else originals(concepts))
        return
    sets = SETS | {"final": SETS["main"], "closed": CLOSED, "every": ("aegis+",)}
    if what not in sets and not given.presets:
        options.error(f"no set {what!r}: {', '.join(sets)}")
    names = given.presets or sets[what]
    if what == "closed":
        wanted = closed(names, concepts, given.quick)
    elif what == "every":
        wanted = every(names, given.concepts, given.steps)
    elif what == "final":
        wanted = finals(names, **axes, steps=given.steps)
    else:
        wanted = screening(names, **axes)
    if given.what[0] == "table":
        have = {cells.key(line["cell"]): line for line in cells.read(out)}
        if what == "every" and given.steps is not None:  # beside those of the usual steps
            wanted = every(names, given.concepts) + wanted
        shown = table_of_values if what == "every" else table
        print(shown([have[cells.key(cell)] for cell in wanted if cells.key(cell) in have]))
        return
    cells.run(wanted, lambda cell: measure(cell, cells.read(out)), out, share=given.share)
