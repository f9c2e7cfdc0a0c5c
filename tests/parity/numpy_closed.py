"""The closed forms in float64 NumPy, from the papers' equations alone and in their form: columns c, W (out, d).

Nothing of aegis_jax is imported. Inverses and projectors stand as the papers write them.
"""

import numpy as np


def uce(w, erased, preserved, *, erase_scale, preserve_scale, lamb):
    """UCE, equation 7. erased: [(c (d, n), v* (out, n)), ...]; preserved: [c (d, m), ...]."""
    left, right = lamb * w, lamb * np.eye(w.shape[1])
    for c, goal in erased:
        left = left + erase_scale * goal @ c.T
        right = right + erase_scale * c @ c.T
    for c in preserved:
        left = left + preserve_scale * (w @ c) @ c.T
        right = right + preserve_scale * c @ c.T
    return left @ np.linalg.inv(right)


def rece_adversary(now, before, c, regular_scale):
    """RECE, equation 9: of concept's columns c, from all projections after an edit (`now`) and before any."""
    square = regular_scale * np.eye(len(c)) + sum(w.T @ w for w in now)
    return np.linalg.inv(square) @ sum(w.T @ old for w, old in zip(now, before)) @ c


def rece(weights, erased, whole, preserved, *, epochs, regular_scale, **scales):
    """RECE. erased: [(c, c of the guide), ...] of the first edit; whole: the same of all tokens. Returns all W."""
    now = [uce(w, [(c, w @ g) for c, g in erased], preserved, **scales) for w in weights]
    for _ in range(epochs):
        found = [(rece_adversary(now, weights, c, regular_scale), g) for c, g in whole]
        now = [uce(w, [(a, w @ g) for a, g in found], preserved, **scales) for w in now]
    return now


def speed(w, erased, kept, invariant, *, threshold, retain_scale, lamb, noise=None):
    """SPEED, equations 9 to 11. erased: [(c, c of the anchor), ...]; kept: columns (d, n); invariant: columns (d, k).

    noise: (copies, d, n), what each copy of each kept column is moved by before the projection of DPA; None: neither
    prior filtering nor augmentation.
    """
    identity = np.eye(w.shape[1])
    square = np.mean([c @ c.T for c, _ in erased], axis=0)
    cross = np.mean([a @ c.T for c, a in erased], axis=0)
    if noise is not None:
        plain = w @ (cross - square) @ np.linalg.inv(identity + square)
        influence = np.linalg.norm(plain @ kept, axis=0)
        chosen = influence > influence.mean()
        weakest = np.linalg.svd(w, full_matrices=False)[2][-1:].T
        moved = np.concatenate([kept[:, chosen] + weakest @ weakest.T @ each[:, chosen] for each in noise], axis=1)
        influence = np.linalg.norm(plain @ moved, axis=0)
        kept = np.concatenate([kept[:, chosen], moved[:, influence > influence.mean()]], axis=1)
    u, s, _ = np.linalg.svd(kept @ kept.T / kept.shape[1])
    p = u[:, s < threshold] @ u[:, s < threshold].T
    m = np.linalg.inv(square @ p + retain_scale * identity)
    inner = np.linalg.inv(invariant.T @ p @ m @ invariant + lamb * np.eye(invariant.shape[1]))
    return w + w @ (cross - square) @ p @ (identity - m @ invariant @ inner @ invariant.T @ p) @ m


def oce(w, erased, preserved, moment, *, erase_scale, preserve_scale, generic_scale, lamb):
    """OCE. erased: [(c (d, 1), c of the guide), ...]; preserved: [c (d, 1), ...]; moment (d, d). Gram-Schmidt by QR."""
    unit = lambda columns: [w @ c / np.linalg.norm(w @ c) for c in columns]  # noqa: E731
    e, _ = np.linalg.qr(np.hstack(unit([c for c, _ in erased])))
    g, _ = np.linalg.qr(np.hstack(unit([c for _, c in erased])))
    m = -erase_scale * e @ e.T @ (np.eye(len(w)) - g @ g.T) + generic_scale * w @ moment @ w.T + lamb * w @ w.T
    for c in preserved:
        m = m + preserve_scale * (w @ c) @ (w @ c).T
    values, vectors = np.linalg.eigh(m.T @ m)  # the polar factor by the square root
    q = m @ vectors @ np.diag(values**-0.5) @ vectors.T
    if np.linalg.det(q) < 0:
        q = q - 2 * np.outer(q @ vectors[:, 0], vectors[:, 0])
    return q @ w
