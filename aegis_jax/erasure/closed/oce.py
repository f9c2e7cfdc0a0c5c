"""OCE: Orthogonal Concept Erasure (Sun et al., ICML 2026, arXiv 2605.28902).

Where the others add to a projection W (d, out), OCE turns its outputs: W* = W Q' with an orthogonal Q (out, out), so
that the outputs keep their norms and the angles between them. Q is the orthogonal matrix with the largest trace of
Q' M (Procrustes: from M = U S V', Q = U V'),

    M = - erase_scale E (I - G) + preserve_scale sum v v' + generic_scale W' C W + lamb W' W ,

E the projector on the span of the erased texts' outputs, G that of their guides', v the outputs of preserved texts, C
the second moment of the embeddings of ordinary text. Without the first term M is positive and Q the identity.
"""

import numpy as np

RANK = 1e-6  # singular values of unit vectors below this: a direction that is there already


def projector(outputs: np.ndarray) -> np.ndarray:
    """On the span of rows (n, out), each of which counts alike however long it is: (out, out)."""
    sizes = np.linalg.norm(outputs, axis=1, keepdims=True)
    _, s, vt = np.linalg.svd(outputs / np.where(sizes > 0, sizes, 1.0), full_matrices=False)
    basis = vt[s > RANK]
    return basis.T @ basis


def nearest_rotation(m: np.ndarray) -> np.ndarray:
    """The Q with the largest trace of Q'M among rotations: where U V' is a reflection, the direction in which M is
    weakest is turned around."""
    u, _, vt = np.linalg.svd(m)
    if np.linalg.slogdet(u @ vt)[0] < 0:
        u[:, -1] *= -1
    return u @ vt


def change(
    w: np.ndarray, x: np.ndarray, goals: np.ndarray, preserved: np.ndarray, moment: np.ndarray, *,
    erase_scale: float, preserve_scale: float, generic_scale: float, lamb: float,
) -> np.ndarray:  # fmt: skip
    """W* - W for rows x, goals (n, d), preserved (m, d) and moment C (d, d)."""
    off_guide = np.eye(w.shape[1]) - projector(goals @ w)
    held = preserved @ w
    m = w.T @ (generic_scale * moment + lamb * np.eye(len(w))) @ w + preserve_scale * held.T @ held
    return w @ nearest_rotation(m - erase_scale * projector(x @ w) @ off_guide).T - w
