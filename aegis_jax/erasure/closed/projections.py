"""The keys and values of a UNet's cross-attention, and how far a change of theirs has brought the erasure."""

from collections.abc import Callable, Iterator

import numpy as np

from aegis_jax.erasure.trainable import select
from aegis_jax.errors import AegisError


def paths(params: dict, projections: str) -> list[str]:
    """Dotted paths of the matrices (d, out) of nested UNet parameters that `projections` (config.PROJECTIONS) means.

    Raises `AegisError` for a UNet that has none.
    """
    wanted = tuple(f".to_{kind}.kernel" for kind in projections)
    found = [path for path in select(params, "kv") if path.endswith(wanted)]
    if not found:
        raise AegisError("this UNet has no cross-attention: there is nothing that a closed form could edit")
    return found


def matrices(params: dict, projections: str) -> Iterator[tuple[str, np.ndarray]]:
    """(path, matrix in float64) of each, one at a time: those of SDXL are 3 GB at once.

    Raises `AegisError` for one that is not finite.
    """
    chosen = select(params, "kv")
    for path in paths(params, projections):
        matrix = np.asarray(chosen[path], np.float64)
        if not np.isfinite(matrix).all():
            raise AegisError(f"unet: {path} is not finite; load the model in float32, or check its file")
        yield path, matrix


def solved(params: dict, projections: str, change: Callable[[str, np.ndarray], np.ndarray], erased, preserved) -> tuple:
    """({path: change of the matrix, float32}, metrics) for `change(path, matrix)`, of each projection in float64.

    erased: (rows x, rows t that they are to become), each (n, d); preserved: rows k (m, d). Metrics, means over rows,
    outputs and projections, of the change as it is rounded:

      L_e          square of x W* - t W: what is left of the way to the goals
      L_e_before   the same of W: the whole way
      L_p          square of k W* - k W; only if anything is preserved
      drift_norm   norm of the whole change
      per_tensor   "L_e" of each projection, and "drift": norm of the change over the norm of W
    """
    (x, goals), drift, each = erased, {}, []
    for path, matrix in matrices(params, projections):
        drift[path] = moved = change(path, matrix).astype(np.float32)
        moved = moved.astype(np.float64)
        way = (x - goals) @ matrix
        left, off = way + x @ moved, preserved @ moved
        norms = np.linalg.norm(moved), np.linalg.norm(matrix)
        each.append([np.mean(left**2), np.mean(way**2), np.mean(off**2) if len(off) else 0.0, *norms])
    left, way, off, moves, sizes = np.array(each).T
    sizes = np.where(sizes > 0, sizes, 1.0)
    metrics = {"L_e": left.mean(), "L_e_before": way.mean(), "L_p": off.mean(), "drift_norm": np.sqrt((moves**2).sum())}
    if not len(preserved):
        del metrics["L_p"]
    return drift, metrics | {"per_tensor": {"L_e": left, "drift": moves / sizes}}
