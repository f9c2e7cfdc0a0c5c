"""The soft-prompt attack: restarts as a batch against restarts one by one, steps per second.

  python -m benchmarks attack [--restarts 5] [--steps 100] [--rounds 5]

Both sides take the same starts, the same noised images and the same optimiser steps on the world's model, which is
attacked as it is. Compilation is left out: each process first attacks for one chunk. Both must end with the same
losses to rounding, or no times are given.
"""

import dataclasses

from benchmarks import trials

CONCEPT = "star"
IMAGES = 64
# Adam's direction is a gradient over its own size, and 100 such steps carry roundings far: the losses of the last
# steps are compared relative to their size.
TOLERANCE = 1e-2
SIDES = ("batched", "one by one")


def attack(pipeline, images, config, one_by_one: bool):
    """(soft tokens (R, k, d), losses (steps, R))."""
    import jax
    import numpy as np

    from aegis_jax.attacks import prompt, rows
    from aegis_jax.attacks.images import encode_images
    from aegis_jax.attacks.soft_prompt import _data, first_rows, networks

    net = networks(pipeline, CONCEPT)
    gap = prompt.template(pipeline.tokenizer, CONCEPT, config.place, config.tokens)
    start = first_rows(pipeline, {"": config}, {"": gap})
    data = _data(encode_images(pipeline, images, config.batch), config.seed)
    size = 1 if one_by_one else config.restarts
    parts = [jax.tree.map(lambda x, i=i: x[i : i + size], start) for i in range(0, config.restarts, size)]
    counter = rows.Counter(None, config.restarts * config.steps)
    found = [rows.fit(net, part, data, steps=config.steps, batch=config.batch, counter=counter) for part in parts]
    soft = np.concatenate([np.asarray(fitted.soft) for fitted, _, _ in found])
    return soft[:, : config.tokens], np.concatenate([losses for _, losses, _ in found], axis=1)


def timed(pipeline, images, config, side: str) -> tuple[dict, object, object]:
    """({"seconds", "steps_per_s"}, soft tokens, losses); a step of every restart counts."""
    one_by_one = side == SIDES[1]
    attack(pipeline, images, dataclasses.replace(config, steps=min(config.steps, 10)), one_by_one)
    found = []
    (seconds,) = trials.seconds(lambda: found.extend(attack(pipeline, images, config, one_by_one)), 1)
    return {"seconds": seconds, "steps_per_s": config.restarts * config.steps / seconds}, *found


def difference(one: list, other: list) -> float:
    """The largest difference of two (steps, R) losses, relative to the losses' mean."""
    import numpy as np

    one, other = np.asarray(one), np.asarray(other)
    return float(np.abs(one - other).max() / other.mean())


def trial(args) -> None:
    from aegis_jax.attacks.soft_prompt import SoftPromptConfig
    from aegis_jax.evaluation import world
    from aegis_jax.io.pipeline import load_pipeline

    config = SoftPromptConfig(restarts=args.restarts, steps=args.steps, batch=args.batch)
    images = world.concept_images(world.find(CONCEPT), IMAGES)
    figures, _, losses = timed(load_pipeline(args.model), images, config, args.side)
    trials.report(**figures, losses=losses.tolist())


def compared(results: dict[str, list[dict]]) -> dict:
    batched, single = (results[side] for side in SIDES)
    apart = max(difference(a.pop("losses"), b.pop("losses")) for a, b in zip(batched, single))
    if not apart <= TOLERANCE:
        raise SystemExit(f"batched and single restarts differ by {apart:.1e} of the loss: no times are given")
    return {
        "loss_difference": apart,
        "figures": {side: trials.figures(found) for side, found in results.items()},
        "ratio": trials.ratio(batched, single, "steps_per_s"),
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


def main(argv) -> None:
    parser = trials.parser(__doc__, "attack_cpu.json", rounds=5, sides=SIDES)
    parser.add_argument("--model", default="world")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="images per restart and step")
    args = parser.parse_args(argv)
    if args.side:
        return trial(args)
    result = {key: getattr(args, key) for key in ("restarts", "steps", "batch")} | {"about": trials.about()}
    result |= compared(trials.by_sides("attack", SIDES, argv, args.rounds))
    print(text(result))
    trials.write(args.out, result)
