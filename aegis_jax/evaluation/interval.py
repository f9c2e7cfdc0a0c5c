"""Confidence intervals of shares."""

import math

_Z = 1.959964  # of 95 % of a normal distribution


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The Wilson score interval (95 %) of `successes` out of n independent trials: (low, high) in [0, 1].

    It holds for one model and one prompt: restarts and seeds scatter more than draws of noise do.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}")
    share, z2 = successes / n, _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def share(count: int, n: int) -> dict:
    """`count` of n as plain values: "count", "n" and, if there is any, "share" and its 95 % "interval"."""
    plain = {"count": int(count), "n": int(n)}
    return plain | ({"share": int(count) / int(n), "interval": wilson(int(count), int(n))} if n else {})
