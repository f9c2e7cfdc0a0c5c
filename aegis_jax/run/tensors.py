"""per_tensor.safetensors: what a method says of every changed tensor at every step, as one file a run.

Arrays (steps, tensors), float32, by the names that the method gives them. AEGIS: "cosine" of erasure gradient and
drift, "kept" (the sign of <g_e, P_before>: -1 where conflict has flipped since the step before), "omega". Closed forms:
"L_e", "drift" (erasure/closed/projections.py). The tensors' PyTorch keys stand in the file's metadata under
"tensors", as JSON, in the order of the columns; under "first_step", where the rows of earlier steps are lost,
that of the first row. In memory those are NaN, so that row i is always that of step i + 1.
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
        self._lost = 0  # steps before the first row
        self._rows: list[dict] = []

    def append(self, per_tensor: dict) -> None:
        """One step's {name: (tensors,)}."""
        self._rows.append({name: np.asarray(values, np.float32) for name, values in per_tensor.items()})

    def arrays(self) -> dict:
        """{name: (steps, tensors)}, NaN for lost steps; {} where no step is known."""
        lost = np.full((self._lost, len(self.names)), np.nan, np.float32)
        return {name: np.concatenate([lost, rows]) for name, rows in self._known().items()}

    def _known(self) -> dict:
        return {name: np.stack([row[name] for row in self._rows]) for name in (self._rows[0] if self._rows else ())}

    def write(self, path: Path) -> None:
        """Writes the file, or if that fails leaves the old one; nothing if there is nothing to write."""
        if not self._rows:
            return
        unfinished = path.with_name(f".{path.name}.unfinished")
        about = {"tensors": json.dumps(self.names)}
        if self._lost:  # the order of several entries is not fixed, and a whole run's file is to be the same each time
            about["first_step"] = str(self._lost + 1)
        save_file(self._known(), unfinished, about)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def read(self, path: Path, steps: int) -> None:
        """Takes over steps 1 to `steps` of a file of the same run; what it does not have of them, or all, is lost.

        Raises `AegisError` for another run's file, and for one that ends before `steps`.
        """
        if not steps or not path.exists():
            self._lost = steps
            return
        try:
            with safe_open(path, "numpy") as file:
                about, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
            names, lost = json.loads(about["tensors"]), int(about.get("first_step", 1)) - 1
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise AegisError(f"{path} cannot be read ({error}); delete it to go on without its rows") from error
        whole = all(x.ndim == 2 and x.shape[1] == len(self.names) and lost + len(x) >= steps for x in arrays.values())
        if names != self.names or lost < 0 or not whole:
            raise AegisError(f"{path} is not of this run's first {steps} steps; delete it to go on without its rows")
        self._lost = min(lost, steps)
        self._rows = [{key: array[i] for key, array in arrays.items()} for i in range(steps - self._lost)]
