"""The models of an evaluation's table: what the user names, its base, and baselines that are yet to be erased."""

import dataclasses
from pathlib import Path

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io.hub import expand, place
from aegis_jax.models.model import flatten
from aegis_jax.run import config as run_config
from aegis_jax.run.asked import settings as erase_settings
from aegis_jax.run.folder import RunFolder


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


def model_row(given: str, rows: list[Row]) -> Row:
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


def check_same_kind(given, pipeline, base) -> None:
    for part in ("unet", "vae", "text_encoder"):
        if _shapes(getattr(pipeline, part)) != _shapes(getattr(base, part)):
            raise AegisError(f"{given} is no model made of the base: its {part} has other tensors")


def _shapes(model) -> dict:
    return {path: np.shape(leaf) for path, leaf in flatten(model.params).items()}


def baseline_row(name: str, base, concept: str, config, overrides, out: Path, rows: list[Row]) -> Row:
    """The row of a preset, erased into the evaluation's folder; refused where another erasure lies there."""
    folder = out / "baselines" / name
    saved = RunFolder(folder).reopen() if RunFolder(folder).is_run() else None
    settings = erase_settings(base, [concept], config, [*overrides, ("method", name), ("picture.images", "0")], saved)
    label = name if name not in {row.name for row in rows} else f"{name} (baseline)"
    return Row(label, "baseline", str(folder / "pipeline"), folder, settings)
