"""One erasure over several devices: a (data, fsdp) mesh and a rule by size for where each array lies.

The batch of latents is split over both axes; large tensors are split over `fsdp` along their largest divisible
dimension, small ones are replicated. (1, 1) is one device, and the step is the same program in every case.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aegis_jax.errors import AegisError

_SMALL = 2**16  # elements; below this a tensor is replicated, its traffic is not worth a split


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a batch and a tensor lie. Hashable, so that it can be static in a compiled program."""

    mesh: Mesh

    def rounded(self, count: int) -> int:
        """The next multiple of the devices: as many take no longer, and every device has its share."""
        return -(-count // self.mesh.size) * self.mesh.size

    def batch(self, x):
        """Splits the leading axis of a batch over as many devices as divide it, inside a compiled function."""
        spec = PartitionSpec()
        for axes in (("data", "fsdp"), ("data",), ("fsdp",)):
            if x.shape[0] % math.prod(self.mesh.shape[axis] for axis in axes) == 0:
                spec = PartitionSpec(axes)
                break
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def check_batch(self, batch: int) -> None:
        """Raises `AegisError` for a batch of latents that the devices do not divide: each would compute all of it."""
        devices = self.mesh.size
        if batch % devices:
            raise AegisError(
                f"batch={batch} is not divisible by the {devices} devices of the mesh, so each would compute all of "
                f"it; take {devices} or a multiple"
            )

    def tensors(self, tree):
        """Holds every tensor of a tree at its place, inside a compiled function."""
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.sharding(x.shape)), tree)

    def place(self, tree):
        """Moves a tree of arrays, in every process the same, to its place on the mesh."""
        return jax.tree.map(lambda x: self._placed(x, self.sharding(jnp.shape(x))), tree)

    def _placed(self, x, sharding):
        if sharding.is_fully_addressable or not (isinstance(x, np.ndarray) or x.is_fully_addressable):
            return jax.device_put(x, sharding)
        # Each process gives its own devices their parts; `device_put` would compare every array among all processes.
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def sharding(self, shape) -> NamedSharding:
        """The rule by size: the largest dimension that `fsdp` divides is split, if the tensor is not small."""
        parts = self.mesh.shape["fsdp"]
        divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
        if parts == 1 or math.prod(shape) < _SMALL or not divisible:
            return NamedSharding(self.mesh, PartitionSpec())
        axis = max(divisible, key=lambda axis: (shape[axis], axis))  # of equal ones the last: outputs, not inputs
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "fsdp"))


def make_placement(data: int = 1, fsdp: int = 1) -> Placement | None:
    """A placement over data x fsdp devices; None for one device, where there is nothing to place.

    Raises `AegisError` if there are not that many devices.
    """
    count = data * fsdp
    devices = jax.devices()
    if data < 1 or fsdp < 1 or count > len(devices):
        raise AegisError(f"mesh of data={data} x fsdp={fsdp} needs {count} devices, but there are {len(devices)}")
    if jax.process_count() > 1 and count != len(devices):
        raise AegisError(
            f"mesh of data={data} x fsdp={fsdp} has {count} devices, but {jax.process_count()} processes have "
            f"{len(devices)}; take all, e.g. --config.mesh.data={len(devices)}"
        )
    if count == 1:
        return None
    grid = np.asarray(devices[:count]).reshape(data, fsdp)
    return Placement(Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto)))


def lanes_mesh(devices=None) -> Mesh | None:
    """This host's devices (or those given) as an axis `concept`, over which lanes are dealt; None for a single one.

    Lanes say nothing to each other, so a mesh of several hosts would only make them share their fate.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    return Mesh(np.asarray(devices), ("concept",), axis_types=(AxisType.Auto,)) if len(devices) > 1 else None
