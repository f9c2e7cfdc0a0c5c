"""Copying between PyTorch's memory layout and ours, tile by tile and on all cores.

A plain transposed copy walks one of the two arrays with strides of kilobytes, so that every element costs a cache
line; within a tile each line is used whole. NumPy releases the interpreter's lock while it copies.
"""

import concurrent.futures
import functools
import os

import numpy as np

TILE = 64  # rows and columns; 64 x 64 x 9 float32 elements fit the second-level cache
_SMALL = 1 << 16  # elements; below that a tile is no gain


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` (casting too), quick where one of the two is a transposed view."""
    if source.ndim < 2 or source.size < _SMALL or (source.flags.c_contiguous and target.flags.c_contiguous):
        target[...] = source
        return
    # The two axes that are long are the channels, which the layouts have in opposite order.
    rows_axis, columns_axis = sorted(range(source.ndim), key=lambda axis: -source.shape[axis])[:2]

    def strip(first: int) -> None:
        where = [slice(None)] * source.ndim
        where[rows_axis] = slice(first, first + TILE)
        for column in range(0, source.shape[columns_axis], TILE):
            where[columns_axis] = slice(column, column + TILE)
            target[tuple(where)] = source[tuple(where)]

    list(_pool().map(_as_here(strip), range(0, source.shape[rows_axis], TILE)))


def _as_here(function):
    """`function` under the caller's handling of NumPy errors, which else ends at the thread's border."""
    state = np.geterr()

    def run(argument):
        with np.errstate(**state):
            return function(argument)

    return run


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="tiles")
