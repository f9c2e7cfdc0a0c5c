"""per_tensor.safetensors: what a method says of every trained tensor at every step, as one file a run.

Arrays (steps, tensors), float32: "cosine" of erasure gradient and drift, "kept" (the sign of <g_e, P_before>: -1 where
conflict has flipped since the step before), "omega". The tensors' PyTorch keys stand in the file's metadata under
"tensors", as JSON, in the order of the columns.
"""

import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aegis_jax.errors import AegisError


class TensorLog:
    """Rows per step, kept in memory (some 8 kB a step for the whole of SD 1.4) and written whole."""

    def __init__(self, names: list[str]):
        self.names = names
        self._rows: list[dict] = []

    def append(self, per_tensor: dict) -> None:
        """One step's {name: (tensors,)}."""
        self._rows.append({name: np.asarray(values, np.float32) for name, values in per_tensor.items()})

    def arrays(self) -> dict:
        """{name: (steps, tensors)}."""
        return {name: np.stack([row[name] for row in self._rows]) for name in (self._rows[0] if self._rows else ())}

    def write(self, path: Path) -> None:
        """Writes the file, or if that fails leaves the old one; nothing if there is nothing to write."""
        if not self._rows:
            return
        unfinished = path.with_name(f".{path.name}.unfinished")
        save_file(self.arrays(), unfinished, {"tensors": json.dumps(self.names)})
        os.replace(unfinished, path)

    def read(self, path: Path, steps: int) -> None:
        """Takes over the first `steps` rows of a file of the same run. Raises `AegisError` for another's."""
        if not steps or not path.exists():
            return
        try:
            with safe_open(path, "numpy") as file:
                names, arrays = (
                    json.loads(file.metadata()["tensors"]),
                    {key: file.get_tensor(key) for key in file.keys()},
                )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise AegisError(f"{path} cannot be read ({error}); delete it to go on without its rows") from error
        if names != self.names or any(len(array) < steps for array in arrays.values()):
            raise AegisError(f"{path} is not of this run's first {steps} steps; delete it to go on without its rows")
        self._rows = [{key: array[i] for key, array in arrays.items()} for i in range(steps)]
