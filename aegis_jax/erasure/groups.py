"""Same-shaped small tensors stacked, so that what is done per tensor is compiled and dispatched once per shape.

A UNet has hundreds of tensors, and GRP with Adam takes a dozen kernels for each: one by one they take minutes to
compile on a CPU. Large tensors stay alone, since stacking them would copy them and they are few. Every group is an
array (n, *shape), with n = 1 for those; the drift and Adam's moments live in this form.
"""

import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

_LARGE = 2**18  # elements


def groups(tensors: dict) -> dict[str, list[str]]:
    """{path: anything with a shape} -> {group name: paths}; the name is a path (alone) or a shape such as "64x128"."""
    result: dict[str, list[str]] = {}
    for path in sorted(tensors):
        shape = tensors[path].shape
        result.setdefault(path if math.prod(shape) > _LARGE else "x".join(map(str, shape)), []).append(path)
    return result


def order(tensors: dict) -> list[str]:
    """Every path, group by group: the order of `gather`."""
    found = groups(tensors)
    return [path for name in sorted(found) for path in found[name]]


def gather(scalars: dict):
    """{group name: (n,)} -> (number of tensors,)."""
    return jnp.concatenate([scalars[name] for name in sorted(scalars)])


def stack(tensors: dict, like: dict | None = None) -> dict:
    """{path: array} -> {group name: (n, *shape)}; like: whose shapes make the groups, by default the arrays' own."""
    found = groups(tensors if like is None else like)
    return {name: jnp.stack([tensors[path] for path in paths]) for name, paths in found.items()}


def unstack(stacked: dict, like: dict) -> dict:
    """The inverse of `stack`: {group name: (n, ...)} -> {path: (...)}; `like` is what was stacked, or its shapes."""
    return {path: stacked[name][i] for name, paths in groups(like).items() for i, path in enumerate(paths)}


class Unstacked(Mapping):
    """`unstack`, one array at a time: each is made when it is asked for, so that not all exist at once."""

    def __init__(self, stacked: dict, like: dict):
        self._stacked = stacked
        self._places = {path: (name, i) for name, paths in groups(like).items() for i, path in enumerate(paths)}

    def __getitem__(self, path: str) -> jax.Array:
        name, i = self._places[path]
        return self._stacked[name][i]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
