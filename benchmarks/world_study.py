"""Settles method.md's OPEN points, and compares AEGIS with ESD and its own ablations, on the embedded world.

  python benchmarks/world_study.py run SET [--out benchmarks/results/world_study.jsonl]   one line per cell, resumable
  taskset -c 0 python ... run SET --share 0/2 &  taskset -c 1 python ... run SET --share 1/2    two workers, a core each
  python benchmarks/world_study.py table [--out ...]                                      the lines as a Markdown table
  python benchmarks/world_study.py unsaid    how often the world draws each value where its attribute is left unsaid

A cell (see cells.py) is an erasure from the concept's name alone, then plain prompts, held-out synonyms, other values,
other attributes (evaluation.world.measure) and the soft-prompt attack (evaluation.attacked), all judged. The
sets are in world_study_screens.py and world_study_sets.py.
"""

import argparse
import math
import pathlib

import cells
from trials import table as markdown

OUT = cells.RESULTS / "world_study.jsonl"


def chosen(name: str) -> list[dict]:
    """The cells of a set: what to change in the world's config, for which concepts and seeds."""
    from world_study_sets import SETS

    found = SETS[name]
    return [
        {"set": name, "name": label, "overrides": overrides, "concept": concept, "seed": seed}
        | found["measure"]
        | ({"attack": attack} if attack else {})
        for seed in found["seeds"]
        for concept in found.get("concepts", cells.CONCEPTS)
        for label, overrides in found["settings"].items()
        for attack in found.get("attacks", [None])
    ]


def table(path: pathlib.Path) -> str:
    """Mean over seeds (and the number of seeds) per set, settings and concept."""
    rows: dict = {}
    for cell in cells.read(path):
        attack = cell.get("attack", {}).items() if cell["set"].startswith("attack") else ()
        name = " ".join([cell["name"], *(f"{key}={value}" for key, value in attack)])
        rows.setdefault((cell["set"], cell["concept"], name), []).append(cell["figures"])
    return markdown(
        ["set", "concept", "settings", "seeds", *cells.COLUMNS],
        [
            [*key, len(figures), *("-" if math.isnan(mean) else f"{mean:.1%}" for mean in cells.means(figures))]
            for key, figures in sorted(rows.items())
        ],
    )


def unsaid(n: int = 256, seed: int = 9) -> str:
    """The share of n images that show each value, by the judge, where a prompt leaves the value's attribute unsaid."""
    from aegis_jax.diffusion.sample import sample
    from aegis_jax.evaluation import world
    from aegis_jax.world import concepts, judge, quality

    rows = []
    for attribute, values in concepts.ATTRIBUTES.items():
        prompts = world.unsaid_prompts(attribute, n, seed)
        images = sample(cells.original(), prompts, seed=seed, steps=quality.STEPS, guidance=quality.GUIDANCE)
        answers = judge.load()(images)[attribute]
        rows += [[attribute, v.name, f"{(answers == i).mean():.1%}"] for i, v in enumerate(values)]
        rows.append([attribute, "none of these", f"{(answers == concepts.NONE).mean():.1%}"])
    return markdown(["attribute", "value", "drawn where unsaid"], rows)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table", "unsaid"))
    parser.add_argument("set", nargs="?")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--share", default="0/1", help="I/N: of N workers this is number I, from 0")
    args = parser.parse_args(argv)
    if args.what == "table":
        print(table(args.out))
    elif args.what == "unsaid":
        print(unsaid())
    else:
        worker, workers = map(int, args.share.split("/"))
        cells.run(chosen(args.set)[worker::workers], args.out)


if __name__ == "__main__":
    main()
