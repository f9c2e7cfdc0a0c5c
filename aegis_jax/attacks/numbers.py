"""Settings that are several numbers, written with commas."""

import itertools

from aegis_jax.errors import AegisError


def numbers(method: str, name: str, text: str, *, kind: type = float, most: float = float("inf")) -> list:
    """The ascending numbers above 0 and at most `most` of a setting such as "50,100". Raises `AegisError`."""
    try:
        found = [kind(part) for part in str(text).split(",")]
    except ValueError:
        found = []
    if not found or not all(a < b for a, b in itertools.pairwise([0, *found])) or found[-1] > most:
        limit = "" if most == float("inf") else f" and at most {most:g}"
        raise AegisError(
            f"attack {method}: {name}={text!r}, wanted ascending numbers above 0{limit}, with commas between"
        )
    return found
