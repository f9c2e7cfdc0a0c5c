"""K erasures as lanes of one batch against a loop of K single ones, on the world's UNet: milliseconds and their ratio.

  python -m benchmarks lanes [--lanes 1 4 8] [--method aegis+] [--batch 1]

"Gradient" is the forward and backward pass to the trained tensors, as the update makes it; "step" is the whole
training step, its latents from a pool. Both sides are timed in turn, in one process, and a ratio is taken within each
round.
"""

import dataclasses
import functools
import sys

from benchmarks import trials


def concepts(count: int) -> list[str]:
    from aegis_jax.world.concepts import ATTRIBUTES

    names = [value.name for values in ATTRIBUTES.values() for value in values]
    return [names[i % len(names)] for i in range(count)]


def settings(method: str, batch: int):
    from aegis_jax.run import config

    return config.load("world", [("method", method), ("batch", str(batch))]).erase


def gradient(state, frozen, config):
    """({"L_e"}, gradients) at latents that are the same for all lanes."""
    import jax
    import jax.numpy as jnp

    from aegis_jax.erasure import trainable
    from aegis_jax.erasure.aegis.state import Goal
    from aegis_jax.erasure.aegis.step import gradients_of
    from aegis_jax.erasure.latents import Noised

    z = jax.random.normal(jax.random.fold_in(jax.random.key(0), state.step), (config.batch, *frozen.latent_shape))
    theta = trainable.add_drift(frozen.unet, state.drift, config.trainable, frozen.low_bits)
    at = Noised(z, jnp.full(config.batch, 500, jnp.int32))
    goal = Goal(frozen.concept_emb, 0.5 * z)
    losses, _, gradients = gradients_of(frozen, theta, at, goal, None, 0.0, config.trainable, config.low_memory)
    return losses, gradients


class Side:
    """What is timed: calls that wait for their result."""

    def __init__(self, pipeline, names: list[str], config):
        import jax

        from aegis_jax.erasure import lanes
        from aegis_jax.erasure.aegis.setup import setup, setup_each
        from aegis_jax.erasure.aegis.step import erase_step
        from aegis_jax.erasure.batched import batched

        self.config, self.runs = config, [setup(pipeline, name, config) for name in names]
        self.state, self.frozen, own = lanes.stack(setup_each(pipeline, names, config))
        self.step = functools.partial(erase_step, config=config)
        self.lanes = lanes.compiled_step(self.step, self.state, self.frozen, own)
        one = jax.jit(functools.partial(gradient, config=config))
        self.gradient = one
        flags = lanes.varies(self.state), own
        everywhere = lambda shapes: jax.tree.map(lambda _: True, shapes)  # noqa: E731
        self.gradients = batched(one, (self.state, self.frozen), flags, everywhere)

    def calls(self) -> dict:
        """{(part, side): call}"""
        import jax

        ready = jax.block_until_ready

        def step_loop():
            self.runs = [(self.step(state, frozen)[0], frozen) for state, frozen in self.runs]
            ready([state.drift for state, _ in self.runs])

        def step_lanes():
            self.state, metrics = self.lanes(self.state, self.frozen)
            ready((self.state, metrics))

        return {
            ("gradient", "loop"): lambda: ready([self.gradient(*run) for run in self.runs]),
            ("gradient", "lanes"): lambda: ready(self.gradients(self.state, self.frozen)),
            ("step", "loop"): step_loop,
            ("step", "lanes"): step_lanes,
        }


def timed(pipeline, count: int, method: str, batch: int, rounds: int, repeats: int) -> dict:
    """{part: [{"loop": ms, "lanes": ms} of each round]}"""
    import statistics

    chosen = settings(method, batch)
    # Within the pool's life, so that no round pays for a redrawn pool.
    latents = dataclasses.replace(chosen.latents, refresh_every=10**6)
    calls = Side(pipeline, concepts(count), dataclasses.replace(chosen, latents=latents)).calls()
    for call in calls.values():  # compiles what is not yet, and draws the pools
        call()
    found: dict = {"gradient": [], "step": []}
    for _ in range(rounds):
        for part, results in found.items():
            sides = {side: trials.seconds(calls[part, side], repeats) for side in ("loop", "lanes")}
            results.append({side: 1e3 * statistics.median(times) for side, times in sides.items()})
    return found


def main(argv: list[str]) -> None:
    options = trials.parser(__doc__, "lanes.json", rounds=3)
    options.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 8], help="how many at once")
    options.add_argument("--method", default="aegis+", help="a preset")
    options.add_argument("--batch", type=int, default=1, help="latents of each concept in a step")
    options.add_argument("--repeats", type=int, default=5, help="calls of which each round takes the median")
    given = options.parse_args(argv)
    import aegis_jax

    about, pipeline = trials.about(), aegis_jax.load_pipeline("world")
    found, rows = {}, []
    for count in given.lanes:
        found[count] = timed(pipeline, count, given.method, given.batch, given.rounds, given.repeats)
        for part, results in found[count].items():
            times = [trials.shown(trials.spread([each[side] for each in results]), 1) for side in ("loop", "lanes")]
            ratios = trials.spread([each["loop"] / each["lanes"] for each in results])
            rows.append([count, part, *times, trials.shown(ratios)])
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(trials.table(["K", "part", "loop, ms", "lanes, ms", "loop / lanes"], rows))
    trials.write(given.out, {"about": about, "method": given.method, "batch": given.batch, "found": found})
