"""Trains the embedded world: `python -m tools.world.train --out DIR`, from the repository's root.

Five stages, each written to its own file in DIR and skipped when that file exists; a stage that was cut off goes on
from its last checkpoint. Then all is exported as a diffusers folder, DIR/world; to ship it, put that in the place of
aegis_jax/world/weights.
"""

import argparse
import json
import pathlib
import time

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from aegis_jax.errors import AegisError
from aegis_jax.models.model import flatten, unflatten
from aegis_jax.run import cache
from aegis_jax.world import clip
from aegis_jax.world.towers import Committee
from tools.world import export, judges, stages
from tools.world.subject import WORLD, Subject


def say(text: str) -> None:
    """A line with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


class Record:
    """DIR/record.json: seconds and measurements per stage, kept across restarts."""

    def __init__(self, folder: pathlib.Path):
        self.path = folder / "record.json"
        self.values = json.loads(self.path.read_text()) if self.path.exists() else {}

    def update(self, stage: str, **values) -> None:
        """Add `values` to what is known of `stage`; "seconds" adds up over interrupted runs."""
        known = self.values.setdefault(stage, {})
        if "seconds" in values:
            values["seconds"] = round(known.get("seconds", 0) + values["seconds"], 1)
        known.update(values)
        self.path.write_text(json.dumps(self.values, indent=2) + "\n")


def train(out, *, seed: int = 0, plan: stages.Plan | None = None, log=say, subject: Subject = WORLD) -> pathlib.Path:
    """Train what is missing in `out`, export it, and return the exported folder, `out/world` for the world.

    Raises `AegisError` for a seed that numpy or JAX would not take.
    """
    if not 0 <= seed < 2**32:
        raise AegisError(f"seed={seed!r}, wanted 0 to 2**32 - 1")
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shop = stages.Workshop(out, seed, plan or stages.Plan(), log, subject)
    record, parts = Record(out), {}
    for name, make in _STAGES.items():
        path = out / f"{name}.safetensors"
        if path.exists():
            parts[name] = _read(path)
            log(f"{name}: found {path}")
        else:
            log(f"{name}: begins")
            began = time.perf_counter()
            trained, measured = make(shop, parts, name)
            _write(path, trained)
            parts[name] = trained
            record.update(name, seconds=time.perf_counter() - began, **measured)
            log(f"{name}: done: {record.values[name]}")
    command = f"{subject.command} --out {out.name} --seed {seed}"
    folder = export.export(parts, record.values, out / subject.name, seed=seed, command=command, subject=subject)
    log(f"exported {folder}")
    return folder


def start(out: pathlib.Path, folder: pathlib.Path, subject: Subject) -> tuple[int, ...]:
    """Puts the stages of an exported world into `out`, the UNet's as its rounds; returns the steps of these."""
    out.mkdir(parents=True, exist_ok=True)
    parts, stages_ = export.parts_of(folder, subject)
    rounds = stages_["unet"]["rounds"]
    unet = parts.pop("unet")
    for name, params in {**parts, **{f"unet.round{k + 1}": unet for k in range(len(rounds))}}.items():
        if not (out / f"{name}.safetensors").exists():
            _write(out / f"{name}.safetensors", params)
    record = Record(out)
    for name, measured in stages_.items():
        if name not in record.values:
            record.update(name, **measured)
    return tuple(rounds)


def _write(path: pathlib.Path, params: dict) -> None:
    save_file({k: np.asarray(v, np.float32) for k, v in flatten(params).items()}, path)


def _read(path: pathlib.Path) -> dict:
    return unflatten({k: jnp.asarray(v) for k, v in load_file(path).items()})


def _clip(shop, parts, name):
    params = stages.train_clip(shop)
    images, label = shop.fresh(1024)
    answer = clip.Scorer(export.assemble(params, shop.subject), shop.subject.class_ids).zero_shot(images)
    shares = {a: float((answer[a] == label[:, k]).mean()) for k, a in enumerate(answer)}
    return params, {"zero_shot": shares}


def _vae(shop, parts, name):
    params = stages.train_vae(shop)
    images, _ = shop.fresh(512)
    error = (stages.through_vae(params, images, shop.subject.architectures.VAE).astype(np.float32) - images) / 255
    psnr = float(-10 * np.log10((error**2).mean()))
    return params, {"mean_absolute_error": float(np.abs(error).mean()), "psnr": psnr}


def _judge(shop, parts, name):
    params = judges.train_judge(shop, name, shop.subject.material(shop, parts["vae"]))
    images, label = shop.fresh(2048)
    build = shop.subject.architectures
    one = shop.subject.judge(stages.as_model(Committee, build.JUDGES[name], params))
    passed = stages.through_vae(parts["vae"], images, build.VAE)
    return params, {
        "fresh": one.accuracy(images, label),
        "through_vae": one.accuracy(passed, label),
    }


def unet(shop, parts, name, *, scale: float | None = None):
    """Rounds of training, each written to DIR/unet.round1.safetensors and so on, and skipped when that exists.

    scale: the VAE's scaling factor; None measures it on the first pool. Returns the parameters and what was measured.
    """
    text, params = {"text_model": parts["clip"]["text_model"]}, None
    config = shop.subject.architectures.VAE
    scale = scale or stages.encode_pool(parts["vae"], shop.pool, config=config).scaling_factor
    for round in range(len(shop.plan.unet_rounds)):
        path = shop.folder / f"{name}.round{round + 1}.safetensors"
        if not path.exists():
            latents = stages.encode_pool(parts["vae"], shop.pool_of(round), scale, config)
            _write(path, stages.train_unet(shop, text, latents, params=params, round=round))
        params = _read(path)
    return params, {"scaling_factor": scale, "rounds": list(shop.plan.unet_rounds)}


_STAGES = {"clip": _clip, "vae": _vae, "unet": unet, "judge": _judge, "second_judge": _judge}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Train the embedded world (three to four hours on 2 cores).")
    parser.add_argument("--out", required=True, help="folder for stages, checkpoints and world/")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    cache.enable()
    try:
        train(arguments.out, seed=arguments.seed)
    except AegisError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
