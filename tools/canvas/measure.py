"""What the training of the canvas costs on this machine: `python -m tools.canvas.measure --pictures DIR/pictures`.

A few steps of every stage at its real size, and from them the time of the whole `PLAN` of tools/canvas/train.py. The
weights are drawn at random; nothing is written but the drawings.
"""

import argparse
import dataclasses
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.canvas.concepts import THINGS, Concepts
from aegis_jax.models.model import flatten
from aegis_jax.run import cache
from tools.canvas import subject
from tools.canvas.train import PLAN
from tools.world import fit, judges, stages

STEPS = 5  # of each stage, after the one that compiles
POOL = 256  # pictures are as large as ever, only fewer


@dataclasses.dataclass(frozen=True)
class Stopwatch(stages.Workshop):
    """A workshop that takes `STEPS` steps of what it is to train, keeps their seconds in `rows` and trains nothing."""

    rows: list[dict] = dataclasses.field(default_factory=list)

    def fit(self, name, params, loss, batch, *, steps, learning_rate, round=0):
        tx = fit.optimiser(learning_rate, steps)
        state = {"params": params, "optimiser": tx.init(params), "average": jax.tree.map(jnp.copy, params)}
        update, key, seconds = jax.jit(fit.update_fn(loss, tx), donate_argnums=0), jax.random.key(0), []
        cpu = 0.0
        for step in range(STEPS + 1):
            began, used = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(update(state, key, jnp.float32(step), batch(np.random.default_rng(step))))
            seconds.append(time.perf_counter() - began)
            cpu += (time.process_time() - used) * (step > 0)
        row = {
            "stage": name,
            "parameters": sum(int(np.size(leaf)) for leaf in flatten(state["params"]).values()),
            "compile_s": seconds[0],
            "step_s": statistics.median(seconds[1:]),
            "cpu_s": cpu / STEPS,
            "steps": steps,
        }
        self.rows.append(row)
        self.log(line(row))
        return state["params"]


def line(row: dict) -> str:
    """A stage's row as text."""
    minutes = row["steps"] * row["step_s"] / 60
    return (
        f"{row['stage']:13}{row['parameters'] / 1e6:6.2f} M parameters  {1e3 * row['step_s']:7.0f} ms a step "
        f"({1e3 * row['cpu_s']:.0f} of all cores)  {row['steps']:6} steps  {minutes:6.1f} min"
    )


def measure(shop: Stopwatch) -> list[dict]:
    """A row for CLIP, VAE, UNet and either judge."""
    build, (images, labels) = shop.subject.architectures, shop.pool
    stages.train_clip(shop)
    stages.train_vae(shop)
    text = stages.start(stages.clip_model.CLIPTextModel, build.text_config(), 0).params
    latents = np.random.default_rng(0).normal(size=(2, len(images), 8, 8, 4)).astype(np.float32)
    stages.train_unet(shop, text, stages.Latents(*latents, labels, 1.0))
    material = dict.fromkeys(("plain", "odd", "empty", "morph", "noise"), (images, labels))
    for name in build.JUDGES:
        judges.train_judge(shop, name, material)
    return shop.rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=pathlib.Path, required=True, help="folder for what npm brings")
    parser.add_argument("--things", type=int, default=THINGS)
    arguments = parser.parse_args(argv)
    cache.enable()
    concepts = Concepts(arguments.things)
    plan = dataclasses.replace(PLAN, pool=POOL, unet_rounds=(sum(PLAN.unet_rounds),))
    drawn = subject.drawings(arguments.pictures, concepts)
    rows = measure(Stopwatch(None, 0, plan, print, subject.canvas(drawn, concepts)))
    minutes = sum(row["steps"] * row["step_s"] + row["compile_s"] for row in rows) / 60
    size = sum(2 * row["parameters"] for row in rows) / 2**20
    print(f"in all {minutes:.0f} min, besides drawing and the judges' pictures; {size:.0f} MiB in fp16")


if __name__ == "__main__":
    main()
