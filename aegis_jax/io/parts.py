"""Tensors cut into parts of a few megabytes, and work on many parts spread over the cores.

Parts bound the memory that work needs on the way to a small constant, however large the tensors. NumPy and the
operating system's calls release the interpreter's lock while they copy.
"""

import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterable

from aegis_jax.diffusion.threads import cores

PART = 1 << 22  # bytes
ROWS = 64  # a part has a multiple of so many rows, so that laying it out anew uses whole cache lines
_THREADS = 8  # at most; fewer already saturate the memory, and each holds a part


def split(shape: tuple[int, ...], itemsize: int, size: int = PART) -> list:
    """Indices into the first axis that cut a tensor into parts of about `size` bytes: slices, `...` for a scalar."""
    row = math.prod(shape[1:]) * itemsize
    if not shape or not row:
        return [] if shape else [...]
    count = max(size // row // ROWS, 1) * ROWS
    return [slice(first, min(first + count, shape[0])) for first in range(0, shape[0], count)]


def on_all_cores(function: Callable, arguments: Iterable) -> list:
    """`[function(argument) for argument in arguments]` in threads; the first error is raised once nothing runs."""
    futures = [_pool().submit(function, argument) for argument in arguments]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        concurrent.futures.wait(futures)  # a file that is still written must not be closed


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(cores(), _THREADS), thread_name_prefix="parts")
