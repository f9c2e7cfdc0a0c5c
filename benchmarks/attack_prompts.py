"""Attacks by prompt: all prompts at once against prompt by prompt, prompts per second.

  python -m benchmarks attack_prompts [--methods unlearndiffatk] [--cases 16] [--timesteps 3] [--rounds 3]

Both sides attack the same prompts of the world with the settings that `aegis attack` has for it, and with a judge that
never sees the concept, so that no prompt ends early and both do the same work, the judge's images among it. "prompt by
prompt" calls the same compiled attack once for each, as the published code does. Compilation is left out: each process
first attacks for a single step. The first prompt, which has the same random numbers on both sides, must have the same
losses to rounding, or no times are given.
"""

import dataclasses

from benchmarks import trials

CONCEPT = "star"
METHODS = ("unlearndiffatk", "p4d-hard-prompt")
SIDES = ("at once", "prompt by prompt")
TOLERANCE = 1e-2  # of the first losses, relative to their size


def one(given, k: int):
    """The case of number k alone."""
    of_all = ("images", "prompts", "seeds", "made_from")
    return dataclasses.replace(given, **{name: getattr(given, name)[k : k + 1] for name in of_all})


def attack(pipeline, given, method: str, config, side: str):
    """The losses (steps,) of the first prompt, of an attack on all."""
    from aegis_jax.attacks import METHODS as attacks

    parts = [given] if side == SIDES[0] else [one(given, k) for k in range(len(given.prompts))]
    return [attacks[method].run(pipeline, CONCEPT, part, config) for part in parts][0].losses[:, 0]


def timed(pipeline, given, method: str, config, side: str) -> dict:
    """{"seconds", "prompts_per_s", "losses"}; the first attack, of one step, compiles and is not timed."""
    first = given if side == SIDES[0] else one(given, 0)
    attack(pipeline, first, method, dataclasses.replace(config, timesteps=1, iterations=1), side)
    found = []
    (seconds,) = trials.seconds(lambda: found.append(attack(pipeline, given, method, config, side)), 1)
    losses = [float(loss) for loss in found[0][: config.iterations]]
    return {"seconds": seconds, "prompts_per_s": len(given.prompts) / seconds, "losses": losses}


def trial(args) -> None:
    import numpy as np

    from aegis_jax.attacks import configure
    from aegis_jax.evaluation import cases, world
    from aegis_jax.io.pipeline import load_pipeline

    pipeline = load_pipeline("world")
    given = cases.cases(pipeline, world.find(CONCEPT), args.cases, seed=1)
    given = dataclasses.replace(given, judge=lambda images: np.zeros(len(images), bool))
    found = {}
    for method in args.methods:
        config = configure(method, cases.SMALL[method] | {"timesteps": args.timesteps})
        figures = timed(pipeline, given, method, config, args.side)
        found |= {f"{method} {key}": value for key, value in figures.items()}
    trials.report(prompts=len(given.prompts), **found)


def compared(results: dict[str, list[dict]], methods) -> dict:
    """{method: figures of both sides and the ratio of prompts per second}. Raises SystemExit for other losses."""
    at_once, single = (results[side] for side in SIDES)
    found = {}
    for method in methods:
        pairs = zip(at_once, single, strict=True)
        apart = max(difference(a[f"{method} losses"], b[f"{method} losses"]) for a, b in pairs)
        if not apart <= TOLERANCE:
            raise SystemExit(
                f"{method}: losses of the first prompt differ by {apart:.1e} of theirs: no times are given"
            )
        figures = {side: trials.figures([_plain(each, method) for each in results[side]]) for side in SIDES}
        ratio = trials.ratio(at_once, single, f"{method} prompts_per_s")
        found[method] = {"loss_difference": apart, "figures": figures, "ratio": ratio}
    return found


def difference(one: list, other: list) -> float:
    """The largest difference of two rows of losses, relative to the losses' mean."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / (sum(map(abs, other)) / len(other))


def _plain(report: dict, method: str) -> dict:
    return {key: report[f"{method} {key}"] for key in ("seconds", "prompts_per_s")}


def text(result: dict) -> str:
    rows = []
    for method, found in result["methods"].items():
        each = [trials.shown(found["figures"][side]["prompts_per_s"], 3) for side in SIDES]
        rows.append([method, *each, trials.shown(found["ratio"])])
    return trials.table([f"prompts per second, {result['prompts']} prompts", *SIDES, "ratio"], rows)


def main(argv) -> None:
    parser = trials.parser(__doc__, "attack_prompts_cpu.json", rounds=3, sides=SIDES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--cases", type=int, default=16, help="prompts, less those that the base does not draw")
    parser.add_argument("--timesteps", type=int, default=10, help="that the attack goes through")
    args = parser.parse_args(argv)
    if args.side:
        return trial(args)
    result = {"cases": args.cases, "timesteps": args.timesteps, "about": trials.about()}
    results = trials.by_sides("attack_prompts", SIDES, argv, args.rounds)
    prompts = results[SIDES[0]][0]["prompts"]
    result |= {"prompts": prompts, "methods": compared(results, args.methods), "trials": results}
    print(text(result))
    trials.write(args.out, result)
