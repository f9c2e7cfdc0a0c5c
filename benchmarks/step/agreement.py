"""The gate before any timing: do two implementations of the step compute the same thing? numpy only.

Values come from one step at a state whose drift is far from 0, so that there are conflicts to compare. Each stage of
the second implementation is fed the first one's results of the stage before: a difference is seen where it arises.
"""

import numpy as np

FLOAT32_BOUND = 1e-4  # relative, everything but the sampled latent
LATENT_BOUND = 1e-3  # relative, after guided steps that each amplify the last one's rounding
COSINE = 0.99  # between directions, where either side computes in bfloat16
BFLOAT16_LOSS = 0.05  # relative
# A tensor whose gradient is below this share of the whole is rounding noise: a bias in front of a norm that removes it.
NOISE = 1e-6


def compare(ours: dict, theirs: dict, drift: dict, *, exact: bool) -> tuple[dict, list[str]]:
    """Measured disagreements and those out of bounds, each as a sentence.

    ours, theirs: "z_a", "z_b", "v", "p", "L_e" and, per tensor, "g_e:KEY" and "cosine:KEY" (of g_e and the drift);
    theirs also "grad_v", "grad_p". drift: {key: array}. exact: both sides computed in float32.
    """
    found, problems = {}, []

    def check(name, value, good):
        found[name] = float(value)
        if not good:
            problems.append(f"{name} = {value:.3g}")

    for name in ("z_a", "z_b"):
        if exact:
            error = relative(ours[name], theirs[name])
            check(f"{name}, relative error", error, error <= LATENT_BOUND)
        else:
            value = cosine(ours[name], theirs[name])
            check(f"{name}, cosine", value, value >= COSINE)
    error = abs(float(ours["L_e"]) / float(theirs["L_e"]) - 1)
    check("L_e, relative error", error, error <= (FLOAT32_BOUND if exact else BFLOAT16_LOSS))
    for name in ("v", "p"):
        share = _same_tokens(ours[name], theirs[name], theirs[f"grad_{name}"], clear=1e-3 if exact else 0.1)
        check(f"{name}, share of equal signs", share, share >= (1 if exact else 0.99))
    _check_tensors(ours, theirs, drift, exact, check)
    return found, problems


def relative(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def cosine(a, b) -> float:
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _same_tokens(a, b, gradient, clear: float) -> float:
    """Share of the coordinates that moved alike, of those whose gradient is no rounding noise."""
    counted = np.abs(gradient) > clear * np.abs(gradient).max()
    return float(np.mean(np.isclose(a, b, rtol=0, atol=1e-5)[counted]))


def _check_tensors(ours, theirs, drift, exact, check) -> None:
    """Gradients and their cosines with the drift, tensor by tensor (float32) or as one direction (bfloat16)."""
    dots = np.array([[np.vdot(ours[k], ours[k]), np.vdot(theirs[k], theirs[k]), np.vdot(ours[k], theirs[k])]
                     for k in (f"g_e:{key}" for key in drift)])  # fmt: skip
    wanted = np.sqrt(dots[:, 1])
    whole = np.sqrt(dots[:, 1].sum())
    keys = [key for key, size in zip(drift, wanted) if size > NOISE * whole]
    a, b = (np.array([side[f"cosine:{key}"] for key in keys], np.float64) for side in (ours, theirs))
    conflicts = np.mean(b < 0)
    check("share of tensors in conflict", conflicts, 0 < conflicts < 1)
    check("median cosine of the conflicts", np.median(b[b < 0]) if conflicts else 0.0, True)
    check("tensors left out as noise", len(drift) - len(keys), len(keys) > len(drift) / 2)
    if not exact:
        value = dots[:, 2].sum() / np.sqrt(dots[:, 0].sum() * dots[:, 1].sum())
        check("g_e, cosine", value, value >= COSINE)
        check("cosines, cosine over tensors", cosine(a, b), cosine(a, b) >= COSINE)
        return
    error = np.sqrt(sum(np.square(ours[f"g_e:{key}"] - theirs[f"g_e:{key}"]).sum() for key in drift)) / whole
    check("g_e, relative error", error, error <= FLOAT32_BOUND)
    # Relative, below a cosine of 0.1 to that.
    error = np.abs(a - b) / np.maximum(np.abs(b), 0.1)
    check(f"cosine, largest relative error ({keys[int(error.argmax())]})", error.max(), error.max() <= FLOAT32_BOUND)
