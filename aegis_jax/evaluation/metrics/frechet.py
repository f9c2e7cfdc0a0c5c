"""Frechet distance of two sets of images: of the normal distributions with their features' means and covariances.

With InceptionV3's features this is FID; with those of CLIP or of a judge it is the same formula, and its figures
compare only with figures of the same features (whose digest stands beside them) and of as many images: the estimate is
biased upwards, the more the fewer they are.
"""

import numpy as np

from aegis_jax.errors import AegisError


def frechet(features, others) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (n, d) and (k, d), in float64.

    C = A^T A where A is a set's centred features over sqrt(n - 1). The trace of the root is then the sum of the
    singular values of A1 A2^T, since (A1 A2^T)(A1 A2^T)^T has the eigenvalues of C1 C2. Unlike a matrix root of C1 C2
    this squares nothing, so that no half of the digits is lost, and it holds for singular covariances, hence for fewer
    images than features too.

    Raises `AegisError` for sets of fewer than 2 images, of other widths, or with values that are not finite.
    """
    sets = [np.asarray(rows, np.float64) for rows in (features, others)]
    shapes = [rows.shape for rows in sets]
    if any(len(shape) != 2 or shape[0] < 2 or shape[1] < 1 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise AegisError(f"features are {shapes[0]} and {shapes[1]}, wanted (n, d) and (k, d), at least 2 images each")
    if not all(np.isfinite(rows).all() for rows in sets):
        raise AegisError("features are not finite")
    (mean, root), (other_mean, other_root) = map(_mean_and_root, sets)
    cross = np.linalg.svd(root @ other_root.T, compute_uv=False).sum()
    apart = np.square(mean - other_mean).sum() + np.square(root).sum() + np.square(other_root).sum() - 2 * cross
    return max(0.0, float(apart))  # rounding may leave less than nothing of two equal sets


def _mean_and_root(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,), and R (min(n, d), d) with R^T R the covariance."""
    mean = rows.mean(0)
    return mean, np.linalg.qr((rows - mean) / np.sqrt(len(rows) - 1), mode="r")
