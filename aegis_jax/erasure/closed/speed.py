"""SPEED: an edit in the null space of what is preserved (Li et al., ICLR 2026, arXiv 2503.07392, section 4).

Rows of text embeddings are x (to erase), t (their goals), k (preserved) and c (invariants: BOS and the empty prompt).
A projection W (d, out) is changed by the D that minimises

    mean over concepts of ||x (W + D) - t W||^2 + retain_scale ||D||^2   with  N N' D = D  and  c D = 0 .

N (d, m) spans the directions in which the preserved rows have a variance (mean of squares) below `threshold`. With
A = N' mean(x'x) N + retain_scale I, R = N' mean(x'(t - x)) W and B = N' c' that is

    D = N A^-1 (R - B (B' A^-1 B + lamb I)^-1 B' A^-1 R) ,

in an orthonormal basis what the paper writes with the projector N N'; there A is symmetric and small, here it is
factored once. What counts as preserved is a projection's own: rows on which the plain edit D0 = (I + mean(x'x))^-1
mean(x'(t - x)) W has little influence are left out (prior filtering, IPF), and those that stay are joined by copies
moved along the weakest direction of W, as far as these have influence (directed augmentation, DPA).
"""

import dataclasses

import numpy as np

CLUSTERS = 3  # of the empty prompt's tokens, which are all padding and much alike
RANK = 1e-10  # share of the largest eigenvalue below which one is rounding


def invariants(empty: np.ndarray) -> np.ndarray:
    """Rows c: BOS and the centres of `CLUSTERS` clusters of the other rows of the empty prompt (L, d).

    Lloyd's iteration from rows evenly spaced, so that nothing is drawn.
    """
    rows = empty[1:]
    count = min(CLUSTERS, len(rows))
    centres = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    nearest = None
    while True:
        before, nearest = nearest, np.argmin(((rows[:, None] - centres) ** 2).sum(2), 1)
        if before is not None and (nearest == before).all():
            return np.concatenate([empty[:1], centres])
        centres = np.stack([rows[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(count)])


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is the same for every projection.

    Attributes:
      square: mean x'x, (d, d). cross: mean x'(t - x), (d, d).
      preserved: rows k (n, d). noise: how far each copy of each is moved, (aug_num, n). fixed: rows c.
    """

    square: np.ndarray
    cross: np.ndarray
    preserved: np.ndarray
    noise: np.ndarray
    fixed: np.ndarray
    threshold: float
    retain_scale: float
    lamb: float

    @classmethod
    def of(cls, pairs, preserved: np.ndarray, fixed: np.ndarray, config) -> "Problem":
        """pairs: rows (x, t) of each concept; config: SPEEDConfig."""
        noise = np.random.default_rng(config.seed).standard_normal((config.aug_num, len(preserved)))
        return cls(
            np.mean([x.T @ x for x, _ in pairs], 0), np.mean([x.T @ (t - x) for x, t in pairs], 0), preserved, noise,
            fixed, config.threshold, config.retain_scale, config.lamb,
        )  # fmt: skip

    def change(self, _: str, w: np.ndarray) -> np.ndarray:
        """D of a projection W (d, out); 0 where the preserved rows leave no direction free."""
        free = null_space(self.rows_to_keep(w), self.threshold)
        system = free.T @ self.square @ free + self.retain_scale * np.eye(free.shape[1])
        result, fixed = free.T @ (self.cross @ w), free.T @ self.fixed.T
        solved, bound = np.split(np.linalg.solve(system, np.hstack([result, fixed])), [result.shape[1]], 1)
        inner = fixed.T @ bound + self.lamb * np.eye(fixed.shape[1])
        # Of the invariants, what lies outside the free directions cannot change anyway.
        return free @ (solved - bound @ (np.linalg.pinv(inner, RANK, hermitian=True) @ (fixed.T @ solved)))

    def rows_to_keep(self, w: np.ndarray) -> np.ndarray:
        """The preserved rows that count for a projection, filtered and augmented."""
        rows = self.preserved
        if not self.noise.size:
            return rows
        plain = np.linalg.solve(np.eye(len(w)) + self.square, self.cross @ w)
        influence = lambda rows: np.linalg.norm(rows @ plain, axis=1)  # noqa: E731
        kept = _above_mean(influence(rows))
        weakest = np.linalg.svd(w, full_matrices=False)[0][:, -1]
        moved = (rows[kept] + self.noise[:, kept, None] * weakest).reshape(-1, rows.shape[1])
        return np.concatenate([rows[kept], moved[_above_mean(influence(moved))]])


def _above_mean(values: np.ndarray) -> np.ndarray:
    """Which are; where all are equal, all."""
    return values >= values.mean()


def null_space(rows: np.ndarray, threshold: float) -> np.ndarray:
    """An orthonormal basis (d, m) of the directions in which rows (n, d) have a mean square below `threshold`; of no
    rows, of all."""
    values, vectors = np.linalg.eigh(rows.T @ rows / max(1, len(rows)))
    return vectors[:, values < threshold]
