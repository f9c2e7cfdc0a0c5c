"""Gains of a line that others published, each tried once on top of `aegis+` on the embedded world (docs/study.md).

    python -m benchmarks gains                               what is missing of all of them, on the star
    python -m benchmarks gains --gains hellinger --concepts red
    python -m benchmarks gains --table                       measures nothing

They are no settings of this package: none has earned it. So this script puts them into the step from outside, for as
long as a cell runs. Cells, attack and seeds are those of a screening (study.py); lines go to study.jsonl.

  hellinger   gradient of L_e times exp(-c MSE), latent by latent (f-DMU, arXiv 2509.21167), c = 100: what the concept
              adds to a prediction has a mean square of about 1/100 on the world; with c = 1 nothing would change
  late        latents are never of the five noisiest of the grid's 50 steps (SDErasure, ICLR 2026)
  separated   the grid's steps are drawn with odds of the mean square of eps0(c_e) - eps0(c_0) there, on what theta0
              draws for the concept (after SDErasure, which leaves out all below a threshold)
"""

import contextlib
from unittest import mock

from benchmarks import cells, study, trials

RESULT = study.RESULT
GAINS = ("hellinger", "late", "separated")
C = 100.0
NOISIEST = 5
LOOKED_AT = 16  # latents at each step of the grid, for the odds


def grid(gains, concepts) -> list[dict]:
    return [{**cell, "set": "gains", "gain": gain} for gain in gains for cell in study.screening(("aegis+",), concepts)]


def measure(cell: dict) -> dict:
    import jax

    try:
        with applied(cell):
            jax.clear_caches()  # a program that was traced before would draw as it did
            return study.measure(cell, [])
    finally:
        jax.clear_caches()


@contextlib.contextmanager
def applied(cell: dict):
    """The step with a cell's gain in it."""
    from aegis_jax.erasure import latents
    from aegis_jax.erasure.aegis import step

    if cell["gain"] == "hellinger":
        with mock.patch.object(step, "_update", hellinger(step._update)):
            yield
    else:
        with mock.patch.object(latents, "positions", drawn_by(odds(cell))):
            yield


def hellinger(update):
    """`update` with the gradient of L_e times exp(-C MSE), latent by latent, by goals that are so much nearer."""
    from aegis_jax.diffusion.conditioning import per_latent
    from aegis_jax.erasure.aegis import step

    def weighted(frozen, theta, state, at, goal, *rest, **settings):
        eps = step.predicted(frozen, theta, at, per_latent(goal.cond, len(at.z)))
        return update(frozen, theta, state, at, step.Goal(goal.cond, nearer(eps, goal.eps)), *rest, **settings)

    return weighted


def nearer(eps, goal):
    """Goals towards which the mean square has exp(-C MSE) times its gradient at eps, latent by latent, (B, h, w, C)."""
    import jax.numpy as jnp

    miss = eps - goal
    return eps - jnp.exp(-C * jnp.mean(jnp.square(miss), (1, 2, 3), keepdims=True)) * miss


def odds(cell: dict):
    """Of every grid position, (steps,)."""
    import numpy as np

    steps = study.settings(cell).erase.latents.steps
    if cell["gain"] == "late":
        return (np.arange(steps) >= NOISIEST).astype(np.float32)
    return separation(cell, steps)


def separation(cell: dict, steps: int):
    """Mean square of eps0(c_e) - eps0(c_0) at every grid position, (steps,), on theta0's own latents of the concept."""
    import jax
    import jax.numpy as jnp

    import aegis_jax
    from aegis_jax.diffusion.conditioning import join
    from aegis_jax.erasure import latents
    from aegis_jax.erasure.aegis import step
    from aegis_jax.erasure.aegis.setup import freeze

    frozen = freeze(aegis_jax.load_pipeline("world"), [cell["concept"]], study.settings(cell).erase)
    key, size = jax.random.key(cell["evaluation_seed"]), (steps, LOOKED_AT)
    z = jax.jit(lambda key: latents.trajectories(frozen, frozen.unet, frozen.concept_emb, key, size, False))(key)
    pair = jax.tree.map(lambda x: jnp.repeat(x, LOOKED_AT, axis=0), join(frozen.concept_emb, frozen.empty_emb))
    found = []
    for here, t in zip(z, latents.timesteps(frozen, steps)):
        eps = step.predicted(frozen, frozen.unet, latents.Noised(here, jnp.full(LOOKED_AT, t)), pair, shares=2)
        with_concept, without = jnp.split(eps, 2)
        found.append(jnp.mean(jnp.square(with_concept - without)))
    return jax.device_get(jnp.stack(found))


def drawn_by(odds):
    """`latents.positions` with these odds in place of even ones."""
    import jax
    import jax.numpy as jnp

    def positions(key, shape, steps, levels):
        assert len(odds) == steps and levels == "interval", "aegis+ draws from whole grids"
        return jax.random.categorical(key, jnp.log(odds), shape=shape).astype(jnp.int32)

    return positions


def main(argv: list[str]) -> None:
    options = trials.parser(__doc__, RESULT)
    options.add_argument("--gains", nargs="+", choices=GAINS, default=GAINS)
    options.add_argument("--concepts", nargs="+", default=("star",))
    options.add_argument("--table", action="store_true", help="measures nothing")
    given = options.parse_args(argv)
    wanted = grid(given.gains, given.concepts)
    if not given.table:
        cells.run(wanted, measure, given.out)
    keys = {cells.key(cell) for cell in wanted}
    lines = [line for line in cells.read(given.out) if cells.key(line["cell"]) in keys]
    named = [line | {"cell": line["cell"] | {"preset": f"aegis+, {line['cell']['gain']}"}} for line in lines]
    print(study.table(named))
