"""UCE: Unified Concept Editing (Gandikota et al., WACV 2024, arXiv 2308.14761, equation 7).

Rows of text embeddings are x (to erase), t (what they are to become) and k (preserved). A projection W (d, out), keys
or values of a layer, becomes the W* that minimises

    e sum ||x W* - t W||^2 + p sum ||k W* - k W||^2 + lamb ||W* - W||^2 .

With the rows stacked, S = [sqrt(e) x; sqrt(p) k] and R = [sqrt(e) (t - x); 0], that is ridge regression, and

    W* = (I + M) W,   M = (S' S + lamb I)^-1 S' R ,

the same M (d, d) for every projection. The published code inverts the d x d matrix in float32. A row of CLIP has a
squared norm of some hundreds, and all 77 of a prompt point much the same way, so its condition number, a sum of such
norms over lamb, takes most of float32's digits. Here M comes from the singular values of S, in float64: the condition
is that of S, its square root, and lamb = 0 has its limit as meaning, the smallest change that maps x to t.
"""

import numpy as np

RANK = np.finfo(np.float32).eps  # share of the largest below which a singular value is the text encoder's rounding


def ridge(rows: np.ndarray, results: np.ndarray, lamb: float) -> np.ndarray:
    """The M (d, d) with the least ||rows M - results||^2 + lamb ||M||^2 for rows, results (n, d); for lamb = 0 that
    with the least norm among those that fit best."""
    u, s, vt = np.linalg.svd(rows, full_matrices=False)
    share = np.where(s > RANK * s.max(initial=0.0), s, 0.0) / np.where(s > 0, s**2 + lamb, 1.0)
    return vt.T @ (share[:, None] * (u.T @ results))


def edit(
    x: np.ndarray, goals: np.ndarray, preserved: np.ndarray, *, erase_scale: float, preserve_scale: float, lamb: float
) -> np.ndarray:
    """M (d, d) of the module's docstring, for rows x, goals (n, d) and preserved (m, d); 0 where nothing is erased."""
    rows = np.concatenate([np.sqrt(erase_scale) * x, np.sqrt(preserve_scale) * preserved])
    results = np.concatenate([np.sqrt(erase_scale) * (goals - x), np.zeros_like(preserved)])
    return ridge(rows, results, lamb)
