"""The soft-prompt attack: restarts as a batch against restarts one by one, steps per second.

  python benchmarks/attack.py [--restarts 5] [--steps 100] [--rounds 5] [--out FILE.json]

Both sides take the same starts, the same noised images and the same optimiser steps on the world's model, which is
attacked as it is. Compilation is left out: each process first attacks for one chunk. Both must end with the same
losses to rounding, or no times are given.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import time

import trials

CONCEPT = "star"
IMAGES = 64
# Adam's direction is a gradient over its own size, and 100 such steps carry roundings far: the losses of the last
# steps are compared relative to their size.
TOLERANCE = 1e-2
SIDES = ("batched", "one by one")


def attack(pipeline, images, config, one_by_one: bool):
    """(soft tokens (R, k, d), losses (steps, R))."""
    import numpy as np

    from aegis_jax.attacks.soft_prompt import soft_prompt, starts

    if not one_by_one:
        found = soft_prompt(pipeline, CONCEPT, images, config)
        return found.soft_tokens, found.losses
    single = dataclasses.replace(config, restarts=1)
    found = [soft_prompt(pipeline, CONCEPT, images, single, start=start[None]) for start in starts(pipeline, config)]
    return np.concatenate([f.soft_tokens for f in found]), np.concatenate([f.losses for f in found], axis=1)


def timed(pipeline, images, config, side: str) -> tuple[dict, object, object]:
    """({"seconds", "steps_per_s"}, soft tokens, losses); a step of every restart counts."""
    one_by_one = side == SIDES[1]
    attack(pipeline, images, dataclasses.replace(config, steps=min(config.steps, 10)), one_by_one)
    began = time.perf_counter()
    soft, losses = attack(pipeline, images, config, one_by_one)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "steps_per_s": config.restarts * config.steps / seconds}, soft, losses


def difference(one: list, other: list) -> float:
    """The largest difference of two (steps, R) losses, relative to the losses' mean."""
    import numpy as np

    one, other = np.asarray(one), np.asarray(other)
    return float(np.abs(one - other).max() / other.mean())


def trial(args) -> None:
    import numpy as np

    from aegis_jax.attacks.soft_prompt import SoftPromptConfig
    from aegis_jax.evaluation import world
    from aegis_jax.io.pipeline import load_pipeline

    config = SoftPromptConfig(restarts=args.restarts, steps=args.steps, batch=args.batch)
    images = world.concept_images(world.find(CONCEPT), IMAGES)
    figures, _, losses = timed(load_pipeline(args.model), images, config, args.side)
    np.save(args.losses, losses)
    trials.report(**figures)


def compare(args, scratch: pathlib.Path) -> dict:
    import numpy as np

    script, files = pathlib.Path(__file__), {side: scratch / f"{side}.npy" for side in SIDES}
    commands = {
        side: [sys.executable, script, "trial", "--side", side, "--losses", files[side], "--model", args.model]
        + ["--restarts", args.restarts, "--steps", args.steps, "--batch", args.batch]
        for side in SIDES
    }
    results = trials.alternate(commands, args.rounds)
    apart = difference(np.load(files[SIDES[0]]), np.load(files[SIDES[1]]))
    if not apart <= TOLERANCE:
        raise SystemExit(f"batched and single restarts differ by {apart:.1e} of the loss: no times are given")
    return {
        "loss_difference": apart,
        "figures": {side: trials.figures(found) for side, found in results.items()},
        "ratio": trials.ratio(results["batched"], results["one by one"], "steps_per_s"),
        "trials": results,
    }


def text(result: dict) -> str:
    rows = [
        [side, trials.shown(figures["seconds"]), trials.shown(figures["steps_per_s"], 1)]
        for side, figures in result["figures"].items()
    ]
    head = [f"{result['restarts']} restarts x {result['steps']} steps", "seconds", "attack steps per second"]
    return (
        trials.table(head, rows)
        + f"\n\nbatched / one by one: {trials.shown(result['ratio'])} times the steps per second; "
        + f"largest difference of the losses {result['loss_difference']:.1e}"
    )


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("compare", "trial"), default="compare")
    parser.add_argument("--model", default="world")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="images per restart and step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the result")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--losses", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.what == "trial":
        trial(args)
        return
    about = trials.about()
    with tempfile.TemporaryDirectory() as scratch:
        result = {key: getattr(args, key) for key in ("restarts", "steps", "batch")} | {"about": about}
        result |= compare(args, pathlib.Path(scratch))
    print(text(result))
    trials.write(args.out, result)


if __name__ == "__main__":
    main()
