"""A training step as one compiled program against the step's own programs: seconds to compile, seconds a step.

`python -m benchmarks one_program [--method paper]`: the embedded world at the scale of configs/world.py; the two sides
in processes of their own, in the order A B A B.
"""

import functools
import statistics
import time

from benchmarks import trials

SIDES = ("programs", "one program")


def timed(side: str, method: str, steps: int) -> dict:
    import jax

    import aegis_jax
    from aegis_jax.erasure.programs import compile_ahead
    from aegis_jax.run import config

    run = config.load("world", [("method", method)])
    state, frozen = run.method.start(aegis_jax.load_pipeline("world"), list(run.concepts), run.erase, None)
    step = functools.partial(run.method.step, config=run.erase)
    began = time.perf_counter()
    if side == "one program":
        step = jax.jit(step, donate_argnums=0).lower(state, frozen).compile()
    else:
        compile_ahead(functools.partial(step, frozen=frozen), state)
    compiled = time.perf_counter() - began
    state, metrics = step(state, frozen)  # draws the pool
    jax.block_until_ready((state, metrics))

    def one():
        nonlocal state
        state, metrics = step(state, frozen)
        jax.block_until_ready((state, metrics))

    times = trials.seconds(one, steps)
    return {"compile_s": compiled, "step_s": statistics.median(times)}


def main(argv: list[str]) -> None:
    options = trials.parser(__doc__, "one_program.json", rounds=2, sides=SIDES)
    options.add_argument("--method", default="aegis+", help="a preset")
    options.add_argument("--steps", type=int, default=40, help="timed in each process, within the pool's life")
    given = options.parse_args(argv)
    if given.side:
        trials.report(**timed(given.side, given.method, given.steps))
        return
    found = trials.by_sides("one_program", SIDES, ["--method", given.method, "--steps", str(given.steps)], given.rounds)
    figures = {side: trials.figures(reports) for side, reports in found.items()}
    rows = [[side, *(trials.shown(each[key], 3) for key in ("compile_s", "step_s"))] for side, each in figures.items()]
    print(trials.table(["side", "compile, s", "step, s"], rows))
    trials.write(given.out, {"about": trials.about(), "method": given.method, "sides": found})
