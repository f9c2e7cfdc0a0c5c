"""Many values of the world out of one model: erasures merged by `aegis compose`, and trained jointly.

    aegis batch values.csv --model world --out eight --config world --config.trainable=kv
    aegis erase --model world --concept star --concept heart ... --out joint
    python -m benchmarks composed eight --counts 1 2 4 8 --joint joint

Of the batch's first N delta files, in the order of its plan, for each N and way to merge them: the share of images that
show an erased value, for plain prompts and held-out synonyms (mean and worst over the values), and the accuracy on
prompts that name none of them. A joint run is measured on its own concepts. No attack. Prints a Markdown table, writes
the figures to benchmarks/results/composed.json, and measures nothing again that is there already.
"""

import json
import pathlib
import tempfile

from benchmarks import trials

WAYS = ("closed:1", "closed:10", "null-space", "sum")  # as --by and --lamb


def names_of(batch: pathlib.Path, count: int) -> list[tuple[str, pathlib.Path]]:
    """(value, delta file) of the first `count` rows of the plan."""
    from safetensors import safe_open

    files = {}
    for path in sorted((batch / "results").glob("*.safetensors")):
        with safe_open(path, "np") as file:
            (name,) = json.loads(file.metadata()["concepts"])
        files[name] = path
    rows = [json.loads(line) for line in (batch / "plan.jsonl").read_text().splitlines()]
    planned = [row["concepts"][0] for row in rows if row.get("concepts")]
    return [(name, files[name]) for name in planned[:count]]


def measured(pipeline, names: list[str], images: int) -> dict:
    from aegis_jax.evaluation import world

    found = world.measure_several(pipeline, [world.find(name) for name in names], n=images, seed=40)
    return found | {"names": names, "images": images}


def merged(files: list[pathlib.Path], way: str):
    import aegis_jax
    from aegis_jax.run import compose

    base = aegis_jax.load_pipeline("world")
    if len(files) == 1:
        return aegis_jax.apply_delta(base, files[0])
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "merged.safetensors"
        by, _, lamb = way.partition(":")
        compose.write(files, "world", out, by=by, lamb=float(lamb or 1))
        return aegis_jax.apply_delta(base, out)


def row(label: str, found: dict) -> list:
    rates = [list(found[key].values()) for key in ("plain", "held_out")]
    shown = [f"{100 * sum(each) / len(each):.0f} / {100 * max(each):.0f}" for each in rates]
    return [len(found["names"]), label, *shown, f"{100 * found['kept']:.0f}"]


def main(argv: list[str]) -> None:
    options = trials.parser(__doc__, "composed.json")
    options.add_argument("batch", type=pathlib.Path, help="the --out of aegis batch")
    options.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    options.add_argument("--ways", nargs="+", default=list(WAYS))
    options.add_argument("--joint", type=pathlib.Path, nargs="*", default=[], help="run folders")
    options.add_argument("--images", type=int, default=32, help="a figure")
    given = options.parse_args(argv)

    import aegis_jax

    known = json.loads(given.out.read_text())["figures"] if given.out.exists() else {}
    rows = []

    def cell(label: str, key: str, names: list[str], pipeline):
        key = f"{key} {' '.join(names)} {given.images}"
        if key not in known:
            known[key] = measured(pipeline(), names, given.images)
            trials.write(given.out, {"figures": known, "about": trials.about()})
        rows.append(row(label, known[key]))

    cell("before erasure", "original", [name for name, _ in names_of(given.batch, max(given.counts))],
         lambda: aegis_jax.load_pipeline("world"))  # fmt: skip
    for name, file in names_of(given.batch, max(given.counts)):
        cell(f"{name} alone", f"{given.batch.name} alone", [name], lambda file=file: merged([file], "alone"))
    for count in (count for count in given.counts if count > 1):
        names, files = zip(*names_of(given.batch, count))
        for way in given.ways:
            cell(way, f"{given.batch.name} {way}", list(names), lambda files=files, way=way: merged(list(files), way))
    for run in given.joint:
        names = json.loads((run / "manifest.json").read_text())["concepts"]
        cell("joint", run.name, names, lambda run=run: aegis_jax.load_pipeline(run / "pipeline"))
    head = ["values", "how", "plain, mean / worst", "held-out, mean / worst", "kept"]
    print(trials.table(head, rows))
