"""Trains the canvas: `python -m tools.canvas.train --out DIR`, from the repository's root, after
`pip install '.[canvas]'`.

npm brings the emoji sets to DIR/pictures; then come the stages of tools/world/train.py, each written to its own file
in DIR and skipped when that file exists, so that the same command goes on after an interruption; the export is
DIR/canvas. To ship it, put that in the place of aegis_jax/canvas/weights. The sizes of `PLAN` and what they cost:
docs/canvas.md.
"""

import argparse
import dataclasses
import json
import pathlib

from aegis_jax.canvas.concepts import THINGS, Concepts, catalogue
from aegis_jax.canvas.embedded import concepts_of
from aegis_jax.errors import AegisError
from aegis_jax.run import cache
from tools.canvas import subject
from tools.world import export, stages
from tools.world import train as world

PLAN = stages.Plan(
    pool=16_000,
    clip_steps=2_000,
    vae_steps=3_000,
    judge_steps=5_000,
    unet_rounds=(1_500, 2_500),
    unet_batch=64,
    min_snr=5.0,
)


def _claim(out: pathlib.Path, count: int) -> None:
    """Refuses a folder whose stages are of another number of things."""
    said = out / "concepts.json"
    begun = json.loads(said.read_text())["things"] if said.is_file() else count
    if begun != count:
        raise AegisError(f"{out} has begun a canvas of {begun} things, not of {count}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    said.write_text(json.dumps({"things": count}) + "\n")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Train the canvas (some two and a half hours on 2 quiet cores).")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for pictures, stages, canvas/")
    parser.add_argument("--things", type=int, default=THINGS, help=f"how many, up to {len(catalogue())} ({THINGS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=pathlib.Path, help="an exported canvas, whose UNet gets another round")
    parser.add_argument("--steps", type=int, default=PLAN.unet_rounds[-1], help="of that round (%(default)s)")
    arguments = parser.parse_args(argv)
    cache.enable()
    try:
        if arguments.start:
            export.record_of(arguments.start, "canvas")  # before anything is fetched
        concepts = concepts_of(arguments.start) if arguments.start else Concepts(arguments.things)
        _claim(arguments.out, concepts.count)
        drawn = subject.drawings(arguments.out / "pictures", concepts, world.say)
        drawer, plan = subject.canvas(drawn, concepts), PLAN
        if arguments.start:
            rounds = world.start(arguments.out, arguments.start, drawer)
            plan = dataclasses.replace(PLAN, unet_rounds=(*rounds, arguments.steps))
        world.train(arguments.out, seed=arguments.seed, plan=plan, subject=drawer)
    except AegisError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
