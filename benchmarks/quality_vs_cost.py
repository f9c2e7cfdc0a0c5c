"""Erasure quality against UNet evaluations on the embedded world: how stale may the latents be?

  python benchmarks/quality_vs_cost.py screen                  every setting, one seed: what to drop
  python benchmarks/quality_vs_cost.py final --refresh 1 50    the finalists, three seeds and fresh evaluation prompts
  python benchmarks/quality_vs_cost.py table

latents.refresh_every is varied, all else is the world's config: 1 draws a trajectory for every step (the paper), R >
1 keeps a buffer that is redrawn every R steps, 0 never redraws it. The screening leaves out the push that follows and
the empty prompt: they came later, as did the judges of the finals. With R = 50 a final is a cell of world_study.py's
"final, judged anew". UNet evaluations are those of erasure.cost: counted from the settings, not timed. Results go, a
line per cell, to a file from which an interrupted run goes on.
"""

import argparse
import pathlib

import cells
import trials
from world_study_screens import START
from world_study_sets import FOLLOWED, JUDGED_ANEW

REFRESH = (1, 10, 25, 50, 100, 0)
OUT = cells.RESULTS / "quality_vs_cost.jsonl"
WITHOUT = {"prompt.context_rate": 0.0, "preserve.empty": 0.0}
STAGES = {
    "screen": ((0,), cells.SCREEN, WITHOUT),
    "final": ((0, 1, 2), JUDGED_ANEW, START | FOLLOWED),
}


def chosen(stage: str, refresh=REFRESH) -> list[dict]:
    """The cells of a stage."""
    seeds, measure, changes = STAGES[stage]
    return [
        {
            "set": stage,
            "name": _name(R),
            "overrides": changes | {"latents.refresh_every": R},
            "concept": concept,
            "seed": seed,
        }
        | measure
        for seed in seeds
        for concept in cells.CONCEPTS
        for R in refresh
    ]


def _name(refresh: int) -> str:
    return {0: "never", 1: "each step"}.get(refresh, f"every {refresh}")


def cost(stage: str, refresh: int):
    """UNet evaluations per step of a stage's settings with this one."""
    from aegis_jax.erasure.cost import unet_evaluations

    overrides = STAGES[stage][2] | {"latents.refresh_every": refresh}
    return unet_evaluations(cells.config_of({"overrides": overrides, "concept": "star", "seed": 0}).erase)


def table(path: pathlib.Path) -> str:
    """Mean over concepts and seeds per stage and setting, with what it costs; dear settings first."""
    rows: dict = {}
    for cell in cells.read(path):
        rows.setdefault((cell["set"], cell["overrides"]["latents.refresh_every"]), []).append(cell)
    lines = []
    for (stage, refresh), found in sorted(rows.items(), key=lambda row: (row[0][0], -cost(*row[0]).total)):
        total, faithful = cost(stage, refresh).total, cost(stage, 1).total
        figures = [cell["figures"] for cell in found]
        worst = max(f["attacked"] for f in figures)
        lines.append(
            [stage, _name(refresh), f"{total:.1f}", f"{total / faithful:.2f}", len(found)]
            + [f"{mean:.1%}" for mean in cells.means(figures)]
            + [f"{worst:.1%}"]
        )
    head = ["stage", "latents redrawn", "UNet evaluations per step", "/ each step", "cells", *cells.COLUMNS]
    return trials.table([*head, "attacked, worst cell"], lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*STAGES, "table"))
    parser.add_argument("--refresh", type=int, nargs="+", default=REFRESH, help="settings to run")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="JSONL file of the cells")
    parser.add_argument("--json", type=pathlib.Path, help="table: also as JSON, with versions, date and CPU")
    args = parser.parse_args(argv)
    if args.what != "table":
        cells.run(chosen(args.what, args.refresh), args.out)
        return
    text = table(args.out)
    print(text)
    costs = {
        stage: {_name(R): cost(stage, R).__dict__ | {"total": cost(stage, R).total} for R in REFRESH}
        for stage in STAGES
    }
    trials.write(args.json, {"about": trials.about(), "evaluations": costs, "cells": cells.read(args.out)})


if __name__ == "__main__":
    main()
