"""A batch whose latents go through a backward pass in turn (gradient accumulation), so that what it keeps of the
network is that of a few of them.

One after another they give the same figures up to rounding. It costs a sum in float32 for every trained tensor, which
a batch in one turn does without, and the speed of small batches.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def rows(function: Callable, args, at_once: int):
    """`function` of `at_once` rows of `args` at a time: (a sum over the turns, rows of all of them).

    args: a tuple of trees of arrays (B, ...). function(*some of the rows) -> (tree to be summed, tree of rows). Turn i
    has the rows i, n + i, 2 n + i, ... of n turns: where devices share a batch evenly, each has a row in every turn.
    Sums of several turns are float32: in bfloat16 the later ones would be rounded away. `at_once` divides B.
    """
    batch = jax.tree.leaves(args)[0].shape[0]
    turns, rest = divmod(batch, at_once)
    if rest:
        raise ValueError(f"{batch} rows, {at_once} at once")
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
    if not low_memory:
        return batch
    return 1 if placement is None else placement.mesh.size  # which divides the batch (Placement.check_batch)
