"""What a worker does with a group of rows: erases them as lanes of one batch and makes a delta file of each."""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from aegis_jax.batch.plan import Row
from aegis_jax.batch.worker import Result, is_the_machines
from aegis_jax.errors import AegisError
from aegis_jax.io.delta_write import write_drift
from aegis_jax.io.folder import Folder
from aegis_jax.io.pipeline import Pipeline
from aegis_jax.run import card
from aegis_jax.run.folder import device_errors
from aegis_jax.run.lanes import Erased, erase_group, width


def base_hash(folder: Folder, hashes: dict[str, str]) -> str:
    """Of all that an erasure reads of its base: the UNet, the text encoder and tokenizer, and the noise schedule.

    hashes: `delta.base_hashes` of the folder.
    """
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode())
    for name in ("unet", "text_encoder", "scheduler"):
        digest.update(json.dumps(folder.components[name].config, sort_keys=True).encode())
    for file in sorted((folder.path / "tokenizer").iterdir()):
        if file.suffix in (".json", ".txt") and file.is_file():
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class Eraser:
    """`worker.work`'s `erase` and `width` for a pipeline; what was compiled serves all groups that have the shape.

    hashes: `delta.base_hashes` of the pipeline's folder. lanes: on each device.
    """

    def __init__(self, pipeline: Pipeline, model: str, hashes: dict[str, str], lanes: int, progress):
        self._pipeline, self._model, self._hashes = pipeline, model, hashes
        self._lanes, self._progress = lanes, progress
        self._compiled: dict = {}
        self._widths: dict[int, int] = {}  # by the number of the settings

    def width(self, row: Row) -> int:
        if row.settings not in self._widths:
            self._widths[row.settings] = width(row.run, self._lanes)
        return self._widths[row.settings]

    def __call__(self, group: dict[int, Row]) -> Iterator[tuple[int, Result | AegisError]]:
        runs = {lane: row.concepts for lane, row in group.items()}
        run = next(iter(group.values())).run
        has_lanes = self._lanes > 1 and not run.method.without_lanes(run.erase)
        with device_errors("lower --lanes, or " * has_lanes + run.method.smaller):
            erased = erase_group(
                self._pipeline, runs, run, lanes=self._lanes, progress=self._progress, compiled=self._compiled
            )
            for lane, found in erased:
                yield lane, found if isinstance(found, AegisError) else self._result(group[lane], found)

    def _result(self, row: Row, erased: Erased) -> Result | AegisError:
        """A delta file, its own metrics beside it; an `AegisError` if what came out cannot be written."""
        about = {"concepts": json.dumps(row.concepts, ensure_ascii=False), "method": row.run.erase.method}
        with tempfile.TemporaryDirectory(prefix="aegis-") as folder:
            path, run = Path(folder) / "delta.safetensors", dataclasses.replace(row.run, concepts=row.concepts)
            try:
                count = write_drift(
                    self._pipeline, erased.drift, path, card=card.text(run, erased.metrics),
                    base=self._model, hashes=self._hashes, about=about,
                )  # fmt: skip
            except AegisError as error:
                if is_the_machines(error):
                    raise
                return error
            content = path.read_bytes()
        lines = "".join(json.dumps(line) + "\n" for line in erased.metrics)
        record = {"tensors": count, "bytes": len(content), "last": erased.metrics[-1]}
        return Result({".safetensors": content, ".metrics.jsonl": lines.encode()}, record)
