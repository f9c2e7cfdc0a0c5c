"""Several erasures in one model: their changes of the keys and values of cross-attention merged in closed form.

Keys and values see the text embedding alone, so what an erasure does to its own concept is known from its change D_i of
a projection W (d, out) and the rows X_i (n, d) of its texts: X_i D_i. The merged change D is the one that does this to
the rows of each and nothing to the preserved rows P, as far as one matrix can:

    least  sum_i w_i ||X_i D - X_i D_i||^2 + lamb ||P D||^2 + eps ||D||^2 ,
    D = (sum_i w_i X_i'X_i + lamb P'P + eps I)^-1 sum_i w_i X_i'X_i D_i ,

with w_i = 1 / ||X_i||^2, so that a concept counts alike whatever the number of its rows (and P likewise). The d x d
system is the same for all projections, and the sums run over the erasures one at a time: `Merged` keeps those alone,
as much as one change takes, however many there are. The idea of merging by what each does to its own tokens is MACE's
(arXiv 2403.06135), the linear algebra that of any linear layer's regression. Float64 NumPy, as of the closed forms.

For other tensors there is no such form: their inputs are activations.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from aegis_jax.errors import AegisError

RANK = 1e-10  # share of the largest eigenvalue below which one is rounding


class Merged:
    """The sums of the module's docstring; `add` an erasure at a time, then `solve`.

    width: d. lamb: weight of the preserved rows (m, d), all together; those of a concept have 1. eps: of the change.
    """

    def __init__(self, width: int, preserved: np.ndarray | None = None, *, lamb: float = 1.0, eps: float = 0.0):
        if not (0 <= lamb < np.inf and 0 <= eps < np.inf):
            raise AegisError(f"lamb={lamb}, eps={eps}: wanted 0 or more")
        self._gram = eps * np.eye(width)
        if preserved is not None and len(preserved):
            self._gram = self._gram + lamb * _gram(preserved, width)
        self._sums: dict[str, np.ndarray] | None = None

    def add(self, change: Mapping[str, np.ndarray], rows: np.ndarray) -> None:
        """An erasure: {path: its change D_i (d, out)}, of the same paths each time, and its rows X_i (n, d)."""
        gram = _gram(rows, len(self._gram))
        if self._sums is not None and self._sums.keys() != change.keys():
            strange = sorted(self._sums.keys() ^ change.keys())
            raise AegisError(f"erasures of different tensors cannot be merged: {strange[0]} is not in all of them")
        for path, d in change.items():
            if d.shape[0] != len(gram):
                raise AegisError(f"{path} takes inputs of width {d.shape[0]}, the rows have {len(gram)}")
        self._gram = self._gram + gram
        sums = self._sums or {}
        self._sums = {path: sums.get(path, 0.0) + gram @ np.asarray(d, np.float64) for path, d in change.items()}

    def solve(self) -> dict[str, np.ndarray]:
        """{path: the merged change}, float64; with eps = 0 that of the least norm. Raises `AegisError` if none was
        added."""
        if self._sums is None:
            raise AegisError("no erasure to merge; add at least one")
        values, vectors = np.linalg.eigh(self._gram)
        kept = values > RANK * values[-1]
        inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
        return {path: inverse @ total for path, total in self._sums.items()}


def _gram(rows: np.ndarray, width: int) -> np.ndarray:
    """X'X / ||X||^2 of rows (n, d), which counts them as one."""
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
        raise AegisError(f"rows of shape {rows.shape}, wanted (n, {width}) with at least one row")
    return rows.T @ rows / max((rows**2).sum(), np.finfo(np.float64).tiny)


def summed(changes: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The plain sum of changes, what adding delta upon delta does; of a path that one lacks, of the others."""
    total: dict[str, np.ndarray] = {}
    for change in changes:
        for path, d in change.items():
            total[path] = total.get(path, 0.0) + np.asarray(d, np.float64)
    return total


def outside(change: Mapping[str, np.ndarray], preserved: np.ndarray, threshold: float = RANK) -> dict[str, np.ndarray]:
    """A change without what it does to the preserved rows (m, d): P D = 0. threshold: share of their largest variance
    up to which a direction counts as free."""
    values, vectors = np.linalg.eigh(_gram(preserved, np.shape(preserved)[1]))
    free = vectors[:, values <= threshold * values[-1]]
    return {path: free @ (free.T @ np.asarray(d, np.float64)) for path, d in change.items()}


def answers(change: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """What a change does to rows (n, d): X D of all its projections in the order of their paths, flat."""
    return np.concatenate([(rows @ np.asarray(change[path], np.float64)).ravel() for path in sorted(change)])


def interference(norms) -> np.ndarray:
    """M (N, N), M[i, j] = ||X_j D_i|| / ||X_j D_j|| over all projections: what erasure i does to the rows of concept j,
    beside what j's own does. 1 on the diagonal; near 0 elsewhere, a plain sum will do. NaN where j's own does nothing.

    norms: (N, N), of what `answers` gives for erasure i and the rows of concept j.
    """
    own = np.diagonal(norms)
    return norms / np.where(own > 0, own, np.nan)
