"""Lanes: K runs of a method at once, each of a concept of its own, through one batch (docs/performance.md).

Where two runs differ in the weights of cross-attention alone, K of them share every convolution: what is mapped over
the lanes are the trained tensors and what depends on them or on the concept, and a convolution sees the latents of all
lanes as one batch with one kernel. With other weights trained each lane would need its own kernels, which makes every
convolution a grouped one, slower than one run after another; `Method.lanes` says which settings these are.

A lane is a copy of the run on its own: the same seed, so the same timesteps, noise and words as every other lane has,
and the same results up to the order of sums. Nothing reaches from one to another; what is not a number in one leaves
the others as they are, bit by bit.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aegis_jax.erasure.batched import Batched, batched


def spread(runs: list, mesh: Mesh | None) -> list:
    """[(state, frozen), ...] whose frozen arrays lie on every device of a mesh, what is one array in all runs once."""
    if mesh is None:
        return runs
    found: dict = {}

    def everywhere(x):
        if id(x) not in found:
            found[id(x)] = _placed(x, False, mesh)
        return found[id(x)]

    return [(state, jax.tree.map(everywhere, frozen)) for state, frozen in runs]


def stack(runs: list, mesh: Mesh | None = None) -> tuple:
    """(state, frozen, own) of K lanes from their [(state, frozen), ...].

    Of the state all floating-point arrays get a leading axis (K, ...); counts and flags, which are the same in all
    lanes, have none. All are copies. Of the frozen side those that are not one array in all runs get the axis: `own`
    says which, a tree of truths like `frozen`. mesh: over whose axis the lanes are dealt (parallel.mesh.lanes_mesh);
    K is a multiple of its devices.

    Raises `ValueError` if the runs are not at the same step, or K is no multiple.
    """
    if mesh is not None and len(runs) % mesh.size:
        raise ValueError(f"{len(runs)} lanes cannot be dealt to {mesh.size} devices; give a multiple")
    states, frozens = zip(*runs)
    for first, *others in zip(*map(jax.tree.leaves, states)):
        if not _varies(first) and not all(other is first or np.array_equal(other, first) for other in others):
            raise ValueError("runs at different steps cannot be lanes of one batch")
    own = jax.tree.map(lambda *leaves: any(x is not leaves[0] for x in leaves), *frozens)
    state = jax.tree.map(lambda x, *others: jnp.stack([x, *others]) if _varies(x) else jnp.array(x), *states)
    frozen = jax.tree.map(lambda flag, *leaves: jnp.stack(leaves) if flag else leaves[0], own, *frozens)
    place = partial(_placed, mesh=mesh)
    return jax.tree.map(place, state, varies(state)), jax.tree.map(place, frozen, own), own


def _placed(x, flag: bool, mesh: Mesh | None):
    if mesh is None:
        return x
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*mesh.axis_names * flag)))


def _varies(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def varies(state):
    """Which arrays of a state have the lanes' axis, a tree of truths."""
    return jax.tree.map(_varies, state)


def compiled_step(step: Callable, state, frozen, own, mesh: Mesh | None = None) -> Batched:
    """`step(state, frozen) -> (state, metrics)` of a single run as that of all lanes, compiled.

    state, frozen, own, mesh: of `stack`. Each metric gets the axis, (K, ...). The state's buffers are donated where
    the single step donates them. Raises `TypeError` where a count or flag of the state would differ between lanes.
    """

    def wanted(shapes):
        state, metrics = shapes
        return varies(state), jax.tree.map(lambda _: True, metrics)

    return batched(step, (state, frozen), (varies(state), own), wanted, mesh)


def lane(state, k: int):
    """The state of lane k, as that of a run on its own."""
    return jax.tree.map(lambda x: x[k] if _varies(x) else x, state)


def finite(tree) -> jax.Array:
    """Which lanes are free of NaN and infinity, (K,) bool: in every floating-point array of a state, or of metrics."""
    return _finite([x for x in jax.tree.leaves(tree) if _varies(x)])


@jax.jit
def _finite(leaves):
    return jnp.stack([jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in leaves]).all(0)
