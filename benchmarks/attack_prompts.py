"""Attacks by prompt: all prompts at once against prompt by prompt, prompts per second.

  python -m benchmarks attack_prompts [--methods unlearndiffatk p4d-hard-prompt] [--cases 16] [--rounds 3]

Both sides attack the same prompts of one erased world (UCE, whose erasure takes seconds) with the settings and the
judge that `aegis attack` has for it, so that prompts end early on either side. "prompt by prompt" calls the same
compiled attack once for each, as the published code does. Compilation is left out: each process first attacks with a
single iteration. Where the sides do not come to the same outcomes, up to prompts whose success hangs on a rounding,
no times are given.
"""

import dataclasses

from benchmarks import trials

CONCEPT = "star"
METHODS = ("unlearndiffatk", "p4d-hard-prompt")
SIDES = ("at once", "prompt by prompt")
DIFFERENT = 0.1  # share of prompts whose outcome may differ: a success decides on the thousandth part of a loss


def one(given, k: int):
    """The case of number k alone."""
    return dataclasses.replace(
        given, images=given.images[k : k + 1], prompts=given.prompts[k : k + 1], seeds=given.seeds[k : k + 1]
    )


def attack(pipeline, given, method: str, config, side: str) -> list[str]:
    """The outcomes of all prompts."""
    from aegis_jax.attacks import METHODS as attacks

    parts = [given] if side == SIDES[0] else [one(given, k) for k in range(len(given.prompts))]
    return [o for part in parts for o in attacks[method].run(pipeline, CONCEPT, part, config).outcomes]


def timed(pipeline, given, method: str, config, side: str) -> dict:
    """{"seconds", "prompts_per_s", "outcomes"}; the first attack, of a single iteration, compiles and is not timed."""
    first = given if side == SIDES[0] else one(given, 0)
    attack(pipeline, first, method, dataclasses.replace(config, timesteps=1, iterations=1), side)
    found = []
    (seconds,) = trials.seconds(lambda: found.extend(attack(pipeline, given, method, config, side)), 1)
    return {"seconds": seconds, "prompts_per_s": len(given.prompts) / seconds, "outcomes": found}


def trial(args) -> None:
    import aegis_jax
    from aegis_jax.attacks import configure
    from aegis_jax.evaluation import cases, world

    erased = aegis_jax.erase("world", CONCEPT, config="world", overrides=[("method", "uce")])
    given = cases.cases(erased.original, world.find(CONCEPT), args.cases, seed=1)
    found = {}
    for method in args.methods:
        config = configure(
            method, cases.SMALL[method] | {"iterations": args.iterations} if args.iterations else cases.SMALL[method]
        )
        found |= {
            f"{method} {key}": value for key, value in timed(erased.pipeline, given, method, config, args.side).items()
        }
    trials.report(**found)


def compared(results: dict[str, list[dict]], methods) -> dict:
    """{method: figures of both sides and the ratio of prompts per second}. Raises SystemExit for other outcomes."""
    at_once, single = (results[side] for side in SIDES)
    found = {}
    for method in methods:
        pairs = [
            pair for a, b in zip(at_once, single) for pair in zip(a[f"{method} outcomes"], b[f"{method} outcomes"])
        ]
        apart = sum(a != b for a, b in pairs) / len(pairs)
        if apart > DIFFERENT:
            raise SystemExit(f"{method}: {apart:.0%} of the prompts end otherwise at once: no times are given")
        keys = [f"{method} {key}" for key in ("seconds", "prompts_per_s")]
        found[method] = {
            "different": apart,
            "figures": {
                side: trials.figures([{k.split()[-1]: r[k] for k in keys} for r in results[side]]) for side in SIDES
            },
            "ratio": trials.ratio(at_once, single, f"{method} prompts_per_s"),
        }
    return found


def text(result: dict) -> str:
    rows = []
    for method, found in result["methods"].items():
        each = [trials.shown(found["figures"][side]["prompts_per_s"], 3) for side in SIDES]
        rows.append([method, *each, trials.shown(found["ratio"])])
    return trials.table([f"prompts per second, {result['cases']} prompts asked for", *SIDES, "ratio"], rows)


def main(argv) -> None:
    parser = trials.parser(__doc__, "attack_prompts_cpu.json", rounds=3, sides=SIDES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--cases", type=int, default=16, help="prompts, less those that the base does not draw")
    parser.add_argument("--iterations", type=int, help="at each timestep (default: the world's)")
    args = parser.parse_args(argv)
    if args.side:
        return trial(args)
    result = {"cases": args.cases, "iterations": args.iterations, "about": trials.about()}
    results = trials.by_sides("attack_prompts", SIDES, argv, args.rounds)
    result |= {"methods": compared(results, args.methods), "trials": results}
    print(text(result))
    trials.write(args.out, result)
