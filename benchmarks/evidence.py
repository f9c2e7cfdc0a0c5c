"""The table of docs/evidence.md: erasures of the embedded world under every attack, beside what each keeps.

  python -m benchmarks evidence                              what is missing: erases, evaluates, writes the table
  python -m benchmarks evidence --concepts star --seeds 0 --methods base uce esd --attacks cce,tina
  python -m benchmarks evidence --oracle star=DIR            a model that never saw the concept, as one more row
  python -m benchmarks evidence --first                      a smaller size and five attacks: the page's second table
  python -m benchmarks evidence --quick                      one seed, few images, short attacks; no page is written
  python -m benchmarks evidence --table                      measures nothing, writes the table of what there is

Three concepts, erased with seeds 0, 1 and 2 by every method at the scale of configs/world.py, each seed examined by
`aegis_jax.evaluate` with an evaluation seed of its own. Runs, cells and pages lie in --work, a line for each concept,
seed and method in benchmarks/results/evidence.jsonl: a run that was stopped goes on. A method that this version does
not have, and what was not measured yet, stands in the table as "not run".
"""

import dataclasses
import hashlib
import pathlib

from benchmarks import cells, evidence_table, trials
from benchmarks.evidence_table import SHARES, VALUES

RESULT = "evidence.jsonl"
CONCEPTS, SEEDS = ("star", "red", "striped"), (0, 1, 2)
METHODS = (
    "base", "oracle", "esd", "advunlearn", "stereo", "age", "uce", "speed", "paper", "released", "aegis+", "aegis+near",
)  # fmt: skip
BASE, ORACLE = METHODS[:2]  # the others are presets
# Over three seeds every figure of the table is of 200 generations or more.
FULL = {"images": 100, "cases": 70, "settings": {}, "steps": None}
# Until all of that has been run: what two cores do in an hour or two for a concept and a seed.
FIRST = FULL | {
    "images": 64, "cases": 24, "attacks": "soft-prompt,cce,ring-a-bell-embedding,ladder,unlearndiffatk",
}  # fmt: skip
# With the config's 500 steps its search has not found what it then erases (docs/method.md).
OWN = {"stereo": [("steps", "2500"), ("inversion.steps", "3")]}
# To see that all of it works, in minutes: nothing of it is a result.
QUICK = {
    "images": 8, "cases": 4, "steps": 20,
    "settings": {
        "soft-prompt": {"members": "before-4-prediction", "restarts": "1", "steps": "5"},
        "unlearndiffatk": {"timesteps": "2", "iterations": "2"},
        "p4d-hard-prompt": {"timesteps": "2", "iterations": "2"},
        "p4d-n": {"steps": "4", "check_every": "2"}, "p4d-k": {"steps": "4", "check_every": "2"},
        "cce": {"steps": "5"}, "tina": {"iterations": "1"}, "ring-a-bell": {"generations": "5", "population": "8"},
        "word-search": {"budget": "48", "population": "4", "picked": "4"}, "revival": {"looks": "2"},
        "recall": {"timesteps": "2", "iterations": "1"}, "noise-probe": {"levels": "0.4"},
        "completion-probe": {"levels": "0.2"}, "inpainting-probe": {"masks": "left"},
    },
}  # fmt: skip
PAGE = trials.ROOT / "docs" / "evidence.md"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the cells are. steps: of training, None for the config's; settings: {attack: {setting: text}}."""

    images: int
    cases: int
    attacks: str = "all"
    settings: dict = dataclasses.field(default_factory=dict)
    steps: int | None = None


def known(method: str, oracles: dict) -> bool:
    """Whether this version, or the user, has it."""
    from aegis_jax.erasure.presets import PRESETS

    return method == BASE or (method == ORACLE and bool(oracles)) or method in PRESETS


def grid(concepts, seeds, methods, sizes: Sizes, oracles: dict) -> list[dict]:
    """The cells that can be measured, methods changing fastest."""
    found, how = [], conditions(sizes)
    for cell in cells.grid(concept=concepts, seed=seeds, method=methods):
        if known(cell["method"], oracles) and (cell["method"] != ORACLE or cell["concept"] in oracles):
            found.append(cell | {"how": how, "of": digest(cell, sizes, oracles)})
    return found


def overrides(cell: dict, sizes: Sizes) -> list[tuple[str, str]]:
    """Of the config of a cell's erasure; a closed form has no other number of steps."""
    from aegis_jax.erasure.presets import preset

    trained = preset(cell["method"]).settings.steps > 1
    how = OWN.get(cell["method"], [])
    if trained and sizes.steps is not None:
        how = [("steps", str(sizes.steps)), ("latents.steps", "10")]
    return [("method", cell["method"]), ("seed", str(cell["seed"])), ("picture.images", "0"), *how]


def conditions(sizes: Sizes) -> str:
    """A hash of what is the same for all rows: sizes, attacks, the world's weights."""
    from aegis_jax.report.chosen import chosen
    from aegis_jax.report.embedded import Embedded
    from aegis_jax.world import WEIGHTS

    attacks = chosen(sizes.attacks, sizes.settings, Embedded.usual)
    names = [f"{name}: {cells.stated(config)}" for name, config in sorted(attacks.items())]
    found = hashlib.sha256(repr((sizes.images, sizes.cases, names)).encode())
    for path in sorted(WEIGHTS.rglob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def digest(cell: dict, sizes: Sizes, oracles: dict) -> str:
    """A hash of a cell's model: an erasure's settings, an oracle's weights."""
    from aegis_jax.run import config

    found = hashlib.sha256()
    if cell["method"] == ORACLE:
        for path in sorted(pathlib.Path(oracles[cell["concept"]]).rglob("*.safetensors")):
            found.update(path.read_bytes())
    elif cell["method"] != BASE:
        found.update(cells.stated(config.load("world", overrides(cell, sizes)).erase).encode())
    return found.hexdigest()[:12]


def lines(found: list[dict], concepts, seeds, methods, sizes: Sizes, oracles: dict) -> list[dict]:
    """Of a file's lines those of these axes; of oracles that are not named again, the last that was measured."""
    wanted = {cells.key(cell) for cell in grid(concepts, seeds, methods, sizes, oracles)}
    how, kept = conditions(sizes), {}
    for line in found:
        cell = line["cell"]
        unnamed = cell["method"] == ORACLE and cell["concept"] not in oracles and cell["how"] == how
        axes = cell["concept"] in concepts and cell["seed"] in seeds and ORACLE in methods
        if cells.key(cell) in wanted or (unnamed and axes):
            kept[cell["concept"], cell["seed"], cell["method"]] = line
    return list(kept.values())


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures cells. work: the folder of runs and evaluations; oracles: {concept: folder}."""

    work: pathlib.Path
    sizes: Sizes
    oracles: dict

    def model(self, cell: dict) -> str | None:
        """The folder of a cell's model, erased if it is not yet; None for the base."""
        import aegis_jax
        from aegis_jax.run.folder import RunFolder
        from aegis_jax.run.progress import Progress

        if cell["method"] == BASE:
            return None
        if cell["method"] == ORACLE:
            return str(self.oracles[cell["concept"]])
        run = self._folder(cell) / cell["of"] / cell["method"]  # other settings are another run
        folder = RunFolder(run)
        if not (folder.is_run() and folder.read_manifest().get("status") == "finished"):
            aegis_jax.erase(
                "world", cell["concept"], config="world", overrides=overrides(cell, self.sizes), out=run,
                resume=folder.is_run(), progress=Progress(),
            )  # fmt: skip
        return str(run)

    def report(self, all_of: list[dict]) -> dict:
        """The report of cells of one concept and seed, the base's row first; cells that are there are not measured."""
        import aegis_jax
        from aegis_jax.run.progress import Progress

        first, sizes = all_of[0], self.sizes
        models = [model for model in map(self.model, all_of) if model is not None]
        return aegis_jax.evaluate(
            models, base="world", concept=first["concept"], attacks=sizes.attacks, settings=sizes.settings,
            seeds=str(first["seed"]), images=sizes.images, cases=sizes.cases,
            neutral="none",  # the oracle is the control
            out=self._folder(first) / f"evaluation-{first['how']}", progress=Progress(),
        )  # fmt: skip

    def measure(self, cell: dict) -> dict:
        """A line's figures: counts of shares and attacks, values of the rest."""
        row = self.report([cell])["rows"][-1]
        count = lambda share: {key: share[key] for key in ("count", "n")}  # noqa: E731
        figures = row["figures"]
        return {
            "shares": {name: count(figures[name]) for name in SHARES},
            "values": {name: figures[name].get("value", figures[name].get("mean")) for name in VALUES},
            "attacks": {name: _attacked(attack) for name, attack in row["attacks"].items()},
            # Of erasure and cells, whichever run they were measured in.
            "seconds": round(row["seconds"] + (row["erase_seconds"] or 0), 1),
            "unet_evaluations": row["unet_evaluations"],
        }  # fmt: skip

    def _folder(self, cell: dict) -> pathlib.Path:
        return self.work / f"{cell['concept']}-{cell['seed']}"


def _attacked(attack: dict) -> dict:
    """Counts of an attack; of a family those of every member, so that the strongest is of all seeds together."""
    members = {member: [share["count"], share["n"]] for member, share in attack.get("members", {}).items()}
    return {"members": members} if members else {"count": attack["rate"]["count"], "n": attack["rate"]["n"]}


def main(argv: list[str]) -> None:
    options = trials.parser(__doc__, RESULT)
    options.add_argument("--concepts", nargs="+", default=CONCEPTS)
    options.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of erasure, and of its evaluation")
    options.add_argument("--methods", nargs="+", default=METHODS, help="base, oracle or presets")
    options.add_argument("--attacks", help="all (the default), none, or some with commas")
    options.add_argument("--images", type=int, help=f"a figure (default: {FULL['images']})")
    options.add_argument("--cases", type=int, help=f"prompts to attack (default: {FULL['cases']})")
    options.add_argument("--oracle", action="append", default=[], metavar="CONCEPT=DIR", help="may be repeated")
    options.add_argument("--first", action="store_true", help="the smaller size of the page's second table")
    options.add_argument("--quick", action="store_true", help="one seed, few images, short attacks and training")
    options.add_argument("--table", action="store_true", help="measures nothing")
    work = "of runs and evaluations (default: evaluations/evidence)"
    options.add_argument("--work", type=pathlib.Path, default=pathlib.Path("evaluations/evidence"), help=work)
    options.add_argument("--page", type=pathlib.Path, help="where the table goes (default: docs/evidence.md)")
    given = options.parse_args(argv)
    how = QUICK if given.quick else FIRST if given.first else FULL
    seeds = given.seeds[:1] if given.quick else given.seeds
    oracles = dict(pair.split("=", 1) for pair in given.oracle)
    attacks = given.attacks or how.get("attacks", "all")
    settings = {name: s for name, s in how["settings"].items() if attacks == "all" or name in attacks.split(",")}
    sizes = Sizes(given.images or how["images"], given.cases or how["cases"], attacks, settings, how["steps"])
    axes = given.concepts, seeds, given.methods
    wanted = grid(*axes, sizes, oracles)
    bench = Bench(given.work.resolve(), sizes, oracles)
    if not given.table:
        cells.run(wanted, bench.measure, given.out)
        for concept, seed in dict.fromkeys((cell["concept"], cell["seed"]) for cell in wanted):
            mine = [cell for cell in wanted if (cell["concept"], cell["seed"]) == (concept, seed)]
            bench.report(mine)  # the page of all methods together; every cell is there
    found = cells.read(given.out)
    command = " ".join(["python -m benchmarks evidence", *(part for part in argv if part != "--table")])
    print(evidence_table.text(lines(found, *axes, sizes, oracles), command, given.concepts, given.methods))
    page = given.page or (PAGE if sizes in (Sizes(**FULL), Sizes(**FIRST)) else None)
    if page is not None:  # always of everything that was measured in this size
        of_all = lines(found, CONCEPTS, SEEDS, METHODS, sizes, oracles)
        first = sizes == Sizes(**FIRST)
        command = "python -m benchmarks evidence" + " --first" * first
        text = evidence_table.text(of_all, command, CONCEPTS, METHODS)
        evidence_table.into_page(page, text, "first" if first else "evidence")
