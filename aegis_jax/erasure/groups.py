"""Same-shaped small tensors stacked, so that what is done per tensor is compiled and dispatched once per shape.

A UNet has hundreds of tensors, and GRP with Adam takes a dozen kernels for each: one by one they take minutes to
compile on a CPU. Large tensors stay alone, since stacking them would copy them and they are few. Every group is an
array (n, *shape), with n = 1 for those; the drift and Adam's moments live in this form.
"""

import math

import jax.numpy as jnp

_LARGE = 2**18  # elements


def groups(tensors: dict) -> dict[str, list[str]]:
    """{path: anything with a shape} -> {group name: paths}; the name is a path (alone) or a shape such as "64x128"."""
    result: dict[str, list[str]] = {}
    for path in sorted(tensors):
        shape = tensors[path].shape
        result.setdefault(path if math.prod(shape) > _LARGE else "x".join(map(str, shape)), []).append(path)
    return result


def stack(tensors: dict) -> dict:
    """{path: array} -> {group name: (n, *shape)}."""
    return {name: jnp.stack([tensors[path] for path in paths]) for name, paths in groups(tensors).items()}


def unstack(stacked: dict, like: dict) -> dict:
    """The inverse of `stack`: {group name: (n, ...)} -> {path: (...)}; `like` is what was stacked, or its shapes."""
    return {path: stacked[name][i] for name, paths in groups(like).items() for i, path in enumerate(paths)}
