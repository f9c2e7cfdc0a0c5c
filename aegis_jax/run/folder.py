"""The run folder: what lies where, who may write into it, and what is removed.

config.json       every setting, model and concepts included; what `--resume` reads
metrics.jsonl     one line per step
per_tensor.safetensors   cosines, flips and omega of every trained tensor (tensors.py)
manifest.json     versions, hashes of what came in and went out
checkpoints/      the newest states
pipeline/         the result, a diffusers folder
previous_pipeline/  that of the run which this one replaces, until it has one of its own
before_after.png  the same prompts and noise on both sides
run.lock          while a process works here: which, on what host
"""

import contextlib
import errno
import functools
import json
import math
import os
import shutil
from pathlib import Path

from aegis_jax import __version__
from aegis_jax.errors import AegisError, is_full_device
from aegis_jax.io.folder import read_json
from aegis_jax.io.hub import expand
from aegis_jax.run import claim
from aegis_jax.run import config as run_config
from aegis_jax.run.config import RunConfig

MARK = "aegis_jax"  # the key of config.json that tells a run folder from any other


class RunFolder:
    """Paths of a run folder; making one is `create`, going on in one is `reopen`."""

    def __init__(self, path):
        self.path = expand(path).absolute()
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.per_tensor = self.path / "per_tensor.safetensors"
        self.manifest = self.path / "manifest.json"
        self.checkpoints = self.path / "checkpoints"
        self.pipeline = self.path / "pipeline"
        self.previous = self.path / "previous_pipeline"
        self.picture = self.path / "before_after.png"

    @contextlib.contextmanager
    def claimed(self, *, resume: bool, overwrite: bool):
        """Holds the folder for this process while entered; on failure a folder that is new and empty goes again.

        Raises `AegisError` if another process holds it, if there is no run to resume, or if it is not free.
        """
        check = self.reopen if resume else functools.partial(self.check_free, overwrite)
        if not (self.path / claim.LOCK).exists():
            check()
        with claim.claimed(self.path):
            check()  # once more: before the claim it may have been another's
            yield

    def check_free(self, overwrite: bool) -> None:
        """Refuses a folder that exists, unless it is empty or `overwrite` and a run's."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise AegisError(f"{self.path} is a file: name another folder")
        if all(entry.name == claim.LOCK for entry in self.path.iterdir()):
            return
        if not overwrite:
            raise AegisError(
                f"{self.path} exists: name another folder, go on with it (--resume) or replace it (--overwrite)"
            )
        if not self.is_run():
            raise AegisError(f"{self.path} holds no run of aegis_jax, so it is not overwritten: name another")

    def is_run(self) -> bool:
        try:
            entries = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(entries, dict) and MARK in entries

    def create(self, run: RunConfig) -> None:
        """Makes the folder; of an earlier run in it only its own files are removed, at the end of no link.

        Its pipeline is kept as `previous` until `drop_previous`: this run may fail at its first step.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.pipeline.is_symlink():
            self.pipeline.unlink()
        elif self.pipeline.exists():
            self.drop_previous()
            os.rename(self.pipeline, self.previous)
        if self.checkpoints.is_dir() and not self.checkpoints.is_symlink():
            shutil.rmtree(self.checkpoints)
        for file in (self.metrics, self.per_tensor, self.manifest, self.picture, self.checkpoints):
            file.unlink(missing_ok=True)
        write_json(self.config, {MARK: __version__, **run_config.values(run)})

    def drop_previous(self) -> None:
        if self.previous.exists():
            shutil.rmtree(self.previous)

    def reopen(self) -> RunConfig:
        """The configuration of the run that this folder holds."""
        if not self.path.is_dir():
            raise AegisError(f"nothing to resume: {self.path} does not exist")
        if not self.is_run():
            raise AegisError(f"nothing to resume: {self.path} holds no run of aegis_jax")
        entries = json.loads(self.config.read_text(encoding="utf-8"))
        del entries[MARK]
        return run_config.merge(RunConfig(), entries, where=f"{self.config}: ")

    def check_apart(self, pipeline) -> None:
        """Refuses a run folder that holds the model itself: replacing the run would remove it."""
        if pipeline.source is None:
            return
        source = pipeline.source.folder.path.resolve()
        if self.path.resolve() in (source, *source.parents):
            raise AegisError(f"the model {source} lies inside {self.path}: name another folder")

    def check_space(self, needed: int, checkpoints: int) -> None:
        """Refuses a disk that cannot hold `checkpoints` states and the result, of together `needed` bytes."""
        existing = next(p for p in (self.path, *self.path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise AegisError(
                f"no space left for {self.path}: {checkpoints} checkpoints and the result need {needed / 1e6:.1f} MB, "
                f"{free / 1e6:.1f} MB are free; lower checkpoint.keep or choose another disk"
            )

    def read_manifest(self) -> dict:
        # Absent if the run was stopped before it was written.
        if not self.manifest.exists():
            return {}
        story = read_json(self.manifest)
        model = story.get("model")
        if not (isinstance(model, dict) and "fingerprint" in model and isinstance(story.get("resumed"), list)):
            raise AegisError(f"{self.manifest} does not tell of a run: restore it, or start again (--overwrite)")
        return story

    def read_metrics(self) -> list[dict]:
        """The lines of metrics.jsonl. Raises `AegisError` naming the first that is none of ours."""
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        metrics = []
        for number, line in enumerate(lines, 1):
            try:
                metrics.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise AegisError(f"{self.metrics}, line {number}: no JSON ({error}); mend the line") from error
            if not isinstance(metrics[-1], dict):
                raise AegisError(f"{self.metrics}, line {number}: wanted an object, as every step has; mend the line")
        return metrics


class MetricsFile:
    """metrics.jsonl, opened after the line of step `done`; later lines are computed again."""

    def __init__(self, path: Path, done: int, method: str):
        self._method = method
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True) if path.exists() else []
        if len(lines) < done:
            raise AegisError(f"{path} has {len(lines)} lines, its run has done {done} steps: start again")
        if path.exists():
            write_text(path, "".join(lines[:done]))
        self._file = open(path, "a", encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.close()

    def write(self, step: int, values: dict, seconds: float) -> None:
        """One line; JSON knows no NaN or infinity, so such values become null."""
        numbers = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = {"step": step, "method": self._method, **numbers, "steps_per_s": round(1 / seconds, 3)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Makes the lines survive whatever the next checkpoint survives."""
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def disk_errors(path: Path):
    """Turns a full disk, met anywhere below, into one line."""
    try:
        yield
    except AegisError:
        raise
    except Exception as error:  # Orbax wraps the system's errors in kinds of its own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "Disk quota exceeded" in str(error):
            raise AegisError(
                f"no space left in {path}: the last whole checkpoint is kept; free some space and go on with --resume"
            ) from error
        raise


@contextlib.contextmanager
def device_errors(advice: str):
    """Turns a full device, met anywhere below, into one line."""
    try:
        yield
    except RuntimeError as error:
        if not is_full_device(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise AegisError(f"the device's memory is full ({first}); {advice}") from error


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or, if that fails, leaves the old one as it is."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
