"""Trains the world's UNet anew without one value: `python -m tools.world.oracle --without star --out DIR`.

The retrained oracle is what an erasure of the UNet's weights could reach at best: the same text encoder and VAE, which
such an erasure leaves alone, and a UNet that has seen neither a picture nor a caption of the value, from its first
step. What an attack "finds" in it the attack has brought along. DIR/oracle is a diffusers folder, given to
`aegis evaluate` and `aegis attack` like an erased model; training goes on from its last checkpoint.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io.export import save_pipeline
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models import unet as unet_model
from aegis_jax.run import cache
from aegis_jax.world import concepts
from tools.world import stages, train
from tools.world.architectures import UNET

CARD = """---
library_name: diffusers
license: apache-2.0
tags: [stable-diffusion, aegis_jax]
---

# The embedded world of aegis_jax, without "{name}"

The world's text encoder and VAE, and a UNet trained from scratch on pictures and captions without this value. A control
for erasures and attacks, made by `{command}`.
"""


@dataclasses.dataclass(frozen=True)
class Workshop(stages.Workshop):
    """A workshop whose pictures never show `value`, (attribute's column, index)."""

    value: tuple[int, int] = None

    def pool_of(self, round: int):
        """As `stages.Workshop.pool_of`, less the pictures of the value (and so their captions)."""
        images, label = super().pool_of(round)
        column, index = self.value
        keep = label[:, column] != index
        return images[keep], label[keep]


def train_oracle(out, *, without: str, seed: int = 0, plan: stages.Plan | None = None, log=train.say) -> pathlib.Path:
    """Train what is missing in `out` and return the exported folder `out/oracle`.

    without: a word of the value that it never sees. Raises `AegisError` for a word of no value, and for a seed that
    numpy or JAX would not take.
    """
    try:
        attribute, index = concepts.find(without)
    except KeyError:
        raise AegisError(f"{without!r} names no value of the world: take a word of aegis_jax.world.concepts") from None
    if not 0 <= seed < 2**32:
        raise AegisError(f"seed={seed!r}, wanted 0 to 2**32 - 1")
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _claim(out / "oracle.json", {"without": concepts.ATTRIBUTES[attribute][index].name, "seed": seed})
    world = load_pipeline("world")
    value = list(concepts.ATTRIBUTES).index(attribute), index
    shop = Workshop(out, seed, plan or stages.Plan(), log, value=value)
    parts = {"clip": world.text_encoder.params, "vae": world.vae.params}
    params, _ = train.unet(shop, parts, "unet", scale=world.vae.config["scaling_factor"])
    trained = stages.as_model(unet_model.UNet2DConditionModel, UNET, params)
    name = concepts.ATTRIBUTES[attribute][index].name
    rounds = " ".join(map(str, shop.plan.unet_rounds))
    command = f"python -m tools.world.oracle --without {name} --out {out.name} --seed {seed} --rounds {rounds}"
    folder = out / "oracle"
    card = CARD.format(name=name, command=command)
    pipeline = dataclasses.replace(world, unet=trained)
    save_pipeline(pipeline, folder, dtype=np.float16, overwrite=True, card=card)
    log(f"exported {folder}")
    return folder


def _claim(path: pathlib.Path, what: dict) -> None:
    """Says what a folder is of. Raises `AegisError` for one that was begun as another's."""
    if path.exists() and (begun := json.loads(path.read_text())) != what:
        raise AegisError(f"{path.parent} was begun with {begun}, and this is {what}: name another folder")
    path.write_text(json.dumps(what) + "\n")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Train the world's UNet without one value (about an hour on 2 cores).")
    parser.add_argument("--out", required=True, help="folder for checkpoints and oracle/")
    parser.add_argument("--without", required=True, metavar="WORD", help="a word of the value it never sees")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, nargs="+", metavar="STEPS", help="steps of each round of training")
    arguments = parser.parse_args(argv)
    cache.enable()
    plan = stages.Plan(unet_rounds=tuple(arguments.rounds)) if arguments.rounds else None
    try:
        train_oracle(arguments.out, without=arguments.without, seed=arguments.seed, plan=plan)
    except AegisError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
