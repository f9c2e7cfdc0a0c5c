"""Cells of a study on the embedded world: one erasure, measured and attacked, per line of a resumable JSONL file.

A cell is a dict: "name", "overrides" of the world's config (None: the model as it is), "concept", "seed", "images",
"evaluation_seed" and, optionally, "attack". A cell whose line is in the file is not run again. Evaluation prompts and
noise have seeds of their own: screening uses evaluation seed 0, finalists' figures one that no choice has seen.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
import platform
import sys
import time

CONCEPTS = ("star", "red", "striped")  # a shape, a colour, a texture
# Judged in batches of 64 images.
SCREEN = {"images": 64, "evaluation_seed": 0, "attack": {"restarts": 4, "steps": 60}}
FINAL = {"images": 256, "evaluation_seed": 1}
ATTACK = {"tokens": 4, "restarts": 5, "steps": 100, "batch": 8, "learning_rate": 1e-2}
LOGGED = ("L_e", "drift_norm", "omega", "conflict_share", "mean_cosine")
COLUMNS = ("plain", "held_out", "attacked", "attacked_best", "same", "other", "agreement", "agreement_shown")
RESULTS = pathlib.Path(__file__).parent / "results"


def config_of(cell: dict):
    """The world's config with the cell's changes."""
    from aegis_jax.run import config as run_config

    overrides = dict(cell["overrides"] or {})
    phrases = overrides.pop("phrases", ["{}"])  # in which the concept is named, e.g. "a red {}"
    settings = [(key, str(value)) for key, value in overrides.items()]
    config = run_config.load("world", [*settings, ("seed", str(cell["seed"]))])
    return dataclasses.replace(config, concepts=tuple(phrase.format(cell["concept"]) for phrase in phrases))


def run_cell(cell: dict) -> dict:
    """Erases (unless the cell's overrides are None: the model as it is), measures and attacks."""
    from aegis_jax.attacks import SoftPromptConfig
    from aegis_jax.evaluation import world
    from aegis_jax.evaluation.attacked import attack_family

    began = time.perf_counter()
    erasure = json.dumps(cell["overrides"]), cell["concept"], cell["seed"]
    pipeline, last = erased(*erasure)
    ended, concept = time.perf_counter(), world.find(cell["concept"])
    figures = dict(measured(erasure, cell["images"], cell["evaluation_seed"]))
    attack = {**ATTACK, **cell.get("attack", {})}
    if attack["restarts"]:
        per_restart = cell["images"] // attack["restarts"]
        member = {"before": SoftPromptConfig(**attack)}
        found = attack_family(original(), pipeline, concept, member, seed=cell["evaluation_seed"], n=per_restart)
        found = found["members"]["before"]
        figures |= {"attacked": found["mean"], "attacked_best": found["best"], "attacked_each": found["each"]}
        figures["attacked_second"] = sum(found["second_each"]) / attack["restarts"]
    return cell | {
        "identity": identity(cell),
        "figures": figures,
        "last": {key: last[key] for key in last if key in LOGGED},
        "erase_seconds": round(ended - began, 1),
        "measure_seconds": round(time.perf_counter() - ended, 1),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


@functools.cache
def original():
    from aegis_jax.io.pipeline import load_pipeline

    return load_pipeline("world")


# The newest few are kept: cells that differ only in the attack share an erasure and its measurement.
@functools.lru_cache(maxsize=3)
def erased(overrides: str, concept: str, seed: int):
    """(pipeline, last step's metrics) of one erasure; `overrides` as JSON, "null" for no erasure."""
    import aegis_jax

    changes = json.loads(overrides)
    if changes is None:
        return original(), {}
    config = config_of({"overrides": changes, "concept": concept, "seed": seed})
    result = aegis_jax.erase(original(), config.concepts, config=config)
    return result.pipeline, result.metrics[-1]


@functools.lru_cache(maxsize=3)
def measured(erasure: tuple, images: int, seed: int) -> dict:
    from aegis_jax.evaluation import world

    return world.measure(erased(*erasure)[0], world.find(erasure[1]), n=images, seed=seed)


def versions() -> dict:
    import flax
    import jax

    return {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__}


@functools.cache
def world_hash() -> str:
    """Of what is erased from and of those who judge."""
    from aegis_jax.world import WEIGHTS

    files = ("unet/diffusion_pytorch_model", "judge/model", "second_judge/model")
    weights = b"".join((WEIGHTS / f"{file}.safetensors").read_bytes() for file in files)
    return hashlib.sha256(weights).hexdigest()[:16]


def identity(cell: dict) -> str:
    """All that a cell's figures depend on: every setting but the picture's, the attack, the world's weights."""
    from aegis_jax.run import config as run_config

    settings = None
    if cell["overrides"] is not None:
        values = run_config.values(config_of(cell))
        settings = {key: value for key, value in values.items() if not key.startswith("picture.")}
    attack = {**ATTACK, **cell.get("attack", {})}
    parts = [settings, cell["concept"], cell["images"], cell["evaluation_seed"], attack, world_hash()]
    return json.dumps(parts, sort_keys=True, default=str)


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(cells: list[dict], path: pathlib.Path) -> None:
    """Runs the cells that the file does not hold yet, a line after each."""
    done = {cell["identity"] for cell in read(path)}
    todo = [cell for cell in cells if identity(cell) not in done]
    print(f"{len(todo)} cells to run, results in {path}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    for count, cell in enumerate(todo, 1):
        result = run_cell(cell)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        figures = {key: round(value, 3) for key, value in result["figures"].items() if isinstance(value, float)}
        print(f"{count}/{len(todo)} {cell['name']} {cell['concept']} seed {cell['seed']} {figures}", file=sys.stderr)


def means(figures: list[dict]) -> list[float]:
    """The mean of every column over some cells' figures."""
    return [sum(f.get(column, float("nan")) for f in figures) / len(figures) for column in COLUMNS]
