"""A batch whose latents go through a backward pass in turn, so that it takes the memory of a few of them.

What a backward pass keeps of the network is most of a step's memory, and grows with the batch; sums and rows of the
latents' own are small. One after another they give the same figures up to rounding (gradient accumulation).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def rows(function: Callable, args, at_once: int):
    """`function` of `at_once` rows of `args` at a time: (a sum over the turns, rows of all of them).

    args: a tuple of trees of arrays (B, ...). function(*some of the rows) -> (tree to be summed, tree of rows). Turn i
    has the rows i, n + i, 2 n + i, ... of n turns: where devices share a batch evenly, each has a row in every turn.
    Sums of several turns are float32: in bfloat16 the later ones would be rounded away.
    """
    batch = jax.tree.leaves(args)[0].shape[0]
    turns = batch // at_once
    if turns == 1:
        return function(*args)
    split = jax.tree.map(lambda x: x.reshape(at_once, turns, *x.shape[1:]).swapaxes(0, 1), args)
    shapes, _ = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], split))

    def turn(total, some):
        more, own = function(*some)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, more), own

    total, own = jax.lax.scan(turn, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes), split)
    return total, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, *x.shape[2:]), own)


def at_once(batch: int, placement, low_memory: bool) -> int:
    """How many latents take their turn together: all, or in low memory one for each device that shares the batch."""
    devices = 1 if placement is None else placement.mesh.size
    return devices if low_memory and batch % devices == 0 else batch
