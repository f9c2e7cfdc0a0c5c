"""Copying between PyTorch's memory layout and ours, tile by tile.

A plain transposed copy walks one of the two arrays with strides of kilobytes, so that every element costs a cache
line; within a tile each line is used whole.
"""

import itertools

import numpy as np

TILE = 64  # rows and columns; 64 x 64 x 9 float32 elements fit the second-level cache
_SMALL = 1 << 16  # elements; below that a tile is no gain


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` (casting too), quick where one of the two is a transposed view."""
    if source.ndim < 2 or source.size < _SMALL or (source.flags.c_contiguous and target.flags.c_contiguous):
        target[...] = source
        return
    # The two axes that are long are the channels, which the layouts have in opposite order.
    rows, columns = sorted(range(source.ndim), key=lambda axis: -source.shape[axis])[:2]
    where = [slice(None)] * source.ndim
    for row, column in itertools.product(range(0, source.shape[rows], TILE), range(0, source.shape[columns], TILE)):
        where[rows], where[columns] = slice(row, row + TILE), slice(column, column + TILE)
        target[tuple(where)] = source[tuple(where)]
