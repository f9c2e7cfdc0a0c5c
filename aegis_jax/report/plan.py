"""What an evaluation is made of: models (rows), attacks, cells; all of it checked before anything starts."""

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np

from aegis_jax import __version__
from aegis_jax.attacks import find
from aegis_jax.errors import AegisError
from aegis_jax.evaluation import world
from aegis_jax.io.hub import expand, place
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.model import flatten
from aegis_jax.report.chosen import check_fit, chosen, names
from aegis_jax.run import config as run_config
from aegis_jax.run.erase import settings as erase_settings
from aegis_jax.run.folder import RunFolder
from aegis_jax.world import WEIGHTS
from aegis_jax.world.quality import GUIDANCE, STEPS

PLAIN = "plain"  # the kind of a cell that is no attack
SEEDS = 100_000  # below it the seeds of cases, prompts and noise stay apart


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of the table.

    Attributes:
      name: in the table; each its own.
      role: "base", "model" or "baseline".
      model: what to load: "world", a folder, or the place where a baseline will be.
      run: the run folder that it is of, or None; its curves are shown.
      config: of a baseline: the settings that it is erased with.
    """

    name: str
    role: str
    model: str
    run: Path | None = None
    config: run_config.RunConfig | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """An evaluation.

    Attributes:
      attacks: {name: settings}.
      neutral: the control's word, or None.
      settings, config, overrides: what the user gave of attacks and baselines, for the commands in the report.
    """

    concept: world.Concept
    text: str
    base: str
    rows: list[Row]
    attacks: dict[str, object]
    seeds: tuple[int, ...]
    images: int
    cases: int
    neutral: str | None
    out: Path
    settings: dict[str, dict[str, str]]
    config: str
    overrides: tuple[tuple[str, str], ...]

    def cells(self) -> list[tuple[Row, dict]]:
        """(row, cell) of all there is to measure; a cell names all that its figures depend on but for the models."""
        found = []
        for seed in self.seeds:
            for kind in (PLAIN, *self.attacks):
                for neutral in self._words(kind):
                    found += [(row, self._cell(kind, neutral, seed)) for row in self.rows]
        return found

    def _words(self, kind: str) -> list[str | None]:
        """The neutral words of a kind of cell: None is the concept itself."""
        controlled = self.neutral is not None and kind != PLAIN and find(kind).says
        return [None, self.neutral] if controlled else [None]

    def _cell(self, kind: str, neutral: str | None, seed: int) -> dict:
        config = self.attacks.get(kind)
        return {
            "kind": kind, "settings": None if config is None else dataclasses.asdict(config), "neutral": neutral,
            "seed": seed, "images": self.images, "cases": self.cases,
            "attribute": self.concept.attribute, "value": self.concept.value.name,
            "guidance": GUIDANCE, "steps": STEPS,
        }  # fmt: skip


def versions() -> dict:
    return {"aegis_jax": __version__, "jax": jax.__version__, "backend": jax.default_backend()}


def judge_digest() -> str:
    """sha256 of the weights of the judge that counts."""
    return hashlib.sha256((WEIGHTS / "judge" / "model.safetensors").read_bytes()).hexdigest()


def key(cell: dict) -> str:
    """The name of a cell's files: a hash of what it depends on."""
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:24]


def model_digest(pipeline) -> str:
    """sha256 of all weights of a pipeline and of its noise schedule."""
    digest = hashlib.sha256(json.dumps(pipeline.scheduler, sort_keys=True).encode())
    for name in ("unet", "vae", "text_encoder"):
        for path, leaf in sorted(flatten(getattr(pipeline, name).params).items()):
            array = np.ascontiguousarray(leaf)
            digest.update(f"{name}.{path} {array.dtype} {array.shape}".encode())
            digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def plan(
    models, base, concept, *, attacks="all", settings=None, baselines="", config="world", overrides=(),
    seeds="0,1,2", images=64, cases=16, neutral="thing", out=None,
) -> tuple[Plan, dict]:  # fmt: skip
    """(the plan, {row's name: pipeline} of the models that are there). Raises `AegisError` for all that cannot be.

    attacks, baselines, seeds: lists as on the command line. settings: {attack: {setting: text}}; overrides: (key, text)
    pairs of the baselines' settings. neutral: "none" for no control.
    """
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise AegisError(f"the report needs {package}: pip install 'aegis_jax[report]'")
    for flag, count in (("images", images), ("cases", cases)):
        if count < 1:
            raise AegisError(f"--{flag} {count}: wanted 1 or more")
    taken, numbers = chosen(attacks, settings or {}), _seeds(seeds)
    original, built_in = load_pipeline(base), load_pipeline("world")
    if original.unet.config != built_in.unet.config:
        raise AegisError(f"--base {base} is not the embedded world: no judge says what its pictures show")
    value = world.find(concept)
    if value is None:
        raise AegisError(f"--concept {concept!r} is not one value of the world: its judge cannot count it")
    control = None if neutral == "none" else neutral
    check_fit(original, value, taken, cases, numbers, control)
    folder = expand(out or Path("evaluations") / value.value.name).absolute()
    rows, loaded = [Row("base", "base", place(base))], {"base": original}
    for given in [models] if isinstance(models, str | Path) else models:
        row = _row(given, rows)
        pipeline = load_pipeline(row.model)
        _check_same_kind(given, pipeline, original)
        rows.append(row)
        loaded[row.name] = pipeline
    for name in names(baselines):
        rows.append(_baseline(name, base, concept, config, overrides, folder, rows))
    asked = (settings or {}, str(config), tuple(overrides))
    return Plan(value, concept, place(base), rows, taken, numbers, images, cases, control, folder, *asked), loaded


def _seeds(text: str) -> tuple[int, ...]:
    numbers = names(text)
    if not numbers or not all(number.isdecimal() and int(number) < SEEDS for number in numbers):
        raise AegisError(f"--seeds {text!r}: wanted whole numbers from 0 to {SEEDS - 1}, with commas between")
    return tuple(dict.fromkeys(map(int, numbers)))


def _row(given: str, rows: list[Row]) -> Row:
    """The row of a model that the user names: a run folder, or what `load_pipeline` takes."""
    path = expand(given)
    is_run = (path / "pipeline" / "model_index.json").is_file()
    run = path.resolve() if is_run else path.resolve().parent if path.resolve().name == "pipeline" else None
    if run is not None and not RunFolder(run).is_run():
        run = None
    name = (run or path.resolve()).name if path.exists() else given
    if name in {row.name for row in rows}:
        name = str(given)
    if name in {row.name for row in rows}:
        raise AegisError(f"{given} stands in the table already: name it once")
    return Row(name, "model", place(path / "pipeline" if is_run else given), run)


def _check_same_kind(given, pipeline, base) -> None:
    for part in ("unet", "vae", "text_encoder"):
        if _shapes(getattr(pipeline, part)) != _shapes(getattr(base, part)):
            raise AegisError(f"{given} is no model made of the base: its {part} has other tensors")


def _shapes(model) -> dict:
    return {path: np.shape(leaf) for path, leaf in flatten(model.params).items()}


def _baseline(name: str, base, concept: str, config, overrides, out: Path, rows: list[Row]) -> Row:
    """The row of a preset, erased into the evaluation's folder; refused where another erasure lies there."""
    folder = out / "baselines" / name
    saved = RunFolder(folder).reopen() if RunFolder(folder).is_run() else None
    settings = erase_settings(base, [concept], config, [*overrides, ("method", name), ("picture.images", "0")], saved)
    label = name if name not in {row.name for row in rows} else f"{name} (baseline)"
    return Row(label, "baseline", str(folder / "pipeline"), folder, settings)
