"""What the TPU's compiler says of a program for a chip that is not there (the extra `plan`: libtpu).

Sizes, not times: nothing runs. Padding is in them, since the compiler lays every array out in tiles.
"""

import dataclasses
import hashlib
import importlib.util
import os
import re
from importlib import metadata

import jax
import numpy as np

from aegis_jax.erasure.batched import Program

# A program's collectives, by the names that they have in the compiler's text.
_COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")


def available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def version() -> str:
    return f"libtpu {metadata.version('libtpu')}"


def absent_chip(generation: str):
    """One chip of a TPU generation (v5e, v5p, v6e) that is not there, as a JAX device.

    Raises `ValueError` if libtpu knows none of that name.
    """
    # No lock between compilers, no question to a metadata server that is not there.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    from jax.experimental import topologies

    bounds = "1x1x1" if generation == "v5p" else "1x1"
    found = topologies.get_topology_desc(f"{generation}:{bounds}", platform="tpu", chips_per_host_bounds=(1, 1, 1))
    return found.devices[0]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's account of one program: bytes, FLOPs and collectives. `program` is a hash of what was compiled."""

    argument: int
    output: int
    alias: int
    temp: int
    code: int
    flops: float
    bytes_accessed: float
    collectives: int
    program: str


def lowered(program: Program, device):
    """(what the compiler takes, its hash)."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    there = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in program.args]
    found = program.jitted.lower(*there)
    return found, hashlib.sha256(found.as_text().encode()).hexdigest()[:16]


def compile(program, effort: float = -1.0) -> Compiled:
    """program: of `lowered`. effort: of the compiler, -1 to 1; -1 takes a sixth of the time of 0, and more memory."""
    stage, name = program
    made = stage.compile({"exec_time_optimization_effort": effort})
    memory, cost = made.memory_analysis(), made.cost_analysis() or {}
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        len(_COLLECTIVE.findall(made.as_text())),
        name,
    )


class Padded:
    """What arrays take on the chip, laid out as it lays them: the arguments of a program that does nothing."""

    def __init__(self, device):
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._known: dict = {}

    def size(self, arrays) -> np.ndarray:
        """(bytes, 0): of the lanes there are."""
        key = tuple(map(id, arrays))
        if key not in self._known:
            there = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding) for x in arrays]
            nothing = jax.jit(lambda *leaves: 0, keep_unused=True)
            found = nothing.lower(*there).compile().memory_analysis().argument_size_in_bytes
            self._known[key] = np.array([found, 0], np.int64)
        return self._known[key]
