"""Figures of several seeds as one: shares, means and distances, each with what its uncertainty is known to be."""

import math

from aegis_jax.evaluation.interval import wilson

_Z = 1.959964  # of 95 % of a normal distribution


def pooled(lines: list[dict], *path: str) -> dict:
    """The figure at `path` of the cells' figures, over all seeds.

    share     {"count", "n"} -> these, "share" and Wilson's "interval", of all images of all seeds; None where n is 0. A
              count may have a part of an image
    mean      {"mean", "standard_error", "n"} -> "mean", "n" and the normal "interval", of all images of all seeds
    distance  {"value", "n"} -> the mean of the seeds' own "value", their "range", and the "n" of one seed: distances of
              more images are others

    Each has "by_seed" too.
    """
    by_seed = {}
    for line in lines:
        found = line["figures"]
        for name in path:
            found = found[name]
        by_seed[str(line["cell"]["seed"])] = found
    each = list(by_seed.values())
    of = _shares if "count" in each[0] else _means if "mean" in each[0] else _values
    return of(each) | {"by_seed": by_seed}


def _shares(each: list[dict]) -> dict:
    count, n = (sum(found[name] for found in each) for name in ("count", "n"))
    share = {"share": count / n, "interval": list(wilson(count, n))} if n else {"share": None, "interval": None}
    return {"count": count, "n": n, **share}


def _means(each: list[dict]) -> dict:
    n = sum(found["n"] for found in each)
    mean = sum(found["mean"] * found["n"] for found in each) / n
    errors = [found["standard_error"] for found in each]
    if None in errors:
        return {"mean": mean, "n": n, "interval": None}
    error = math.sqrt(sum((error * found["n"]) ** 2 for error, found in zip(errors, each, strict=True))) / n
    return {"mean": mean, "n": n, "interval": [mean - _Z * error, mean + _Z * error]}


def _values(each: list[dict]) -> dict:
    values = [found["value"] for found in each]
    return {"value": sum(values) / len(values), "n": each[0]["n"], "range": [min(values), max(values)]}


def percent(share: dict | None) -> str:
    return "-" if share is None or share["share"] is None else f"{share['share']:.0%}"


def spread(share: dict) -> str:
    low, high = share["interval"]
    return f"{low:.0%} to {high:.0%}"


def shown(found: dict, unit: str = "images") -> list[str]:
    """A pooled figure as its number, its uncertainty, and what it is of (unit); "" where there is none."""
    if "share" in found:
        if found["share"] is None:
            return ["-", "none left", ""]
        return [percent(found), spread(found), f"{found['count']:.9g} of {found['n']}"]
    if "mean" in found:
        between = "" if found["interval"] is None else "{:.3f} to {:.3f}".format(*found["interval"])
        return [f"{found['mean']:.3f}", between, f"{found['n']} {unit}"]
    low, high = found["range"]
    return [f"{found['value']:.3g}", f"{low:.3g} to {high:.3g}" if low < high else "", f"{found['n']} {unit} a seed"]
