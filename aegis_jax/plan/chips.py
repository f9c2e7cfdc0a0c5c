"""Accelerators by the names that JAX, GKE and their vendors give them: memory and peak arithmetic, as published.

Of memory a program may use less than there is. On a TPU that is what its compiler says when a program is too large (a
slow test compares it); on a GPU the share that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION, 75 %:
https://docs.jax.dev/en/latest/gpu_memory_allocation.html).
"""

import dataclasses
import math
import re

from aegis_jax.errors import AegisError

GIB = 2**30
GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: how it is asked for. kind: "tpu" or "cuda".
      memory: bytes that a program may use.
      flops: peak bfloat16 FLOP/s, dense; None where only the memory is known.
      counts: how many chips of it can be had together, ascending.
      shapes: how these can lie, as Google writes it; none of a GPU, where a shape is but a number.
    """

    name: str
    kind: str
    memory: int
    flops: float | None
    counts: tuple[int, ...]
    shapes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Topology:
    """`count` chips of one kind."""

    chip: Chip
    count: int

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.count}"


def _tpu(name: str, usable_gib: float, tflops: float, shapes) -> Chip:
    counts = sorted({_count(shape) for shape in shapes})
    return Chip(name, "tpu", int(usable_gib * GIB), tflops * 1e12, tuple(counts), tuple(shapes))


def _gpu(name: str, gigabytes: float, tflops: float | None, counts=(1, 2, 4, 8, 16, 32, 64, 128, 256)) -> Chip:
    return Chip(name, "cuda", int(gigabytes * 1e9 * GPU_SHARE), tflops and tflops * 1e12, tuple(counts))


def _count(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Parts of a cube of 4x4x4 chips, and blocks of whole cubes, the shorter sides first. The largest job has 96 cubes;
# Google's page lists some of these blocks and says that there are more.
_MOST_CUBES = 96
_CUBES = [
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
    *(
        f"{4 * a}x{4 * b}x{4 * c}"
        for a in range(1, _MOST_CUBES + 1)
        for b in range(a, _MOST_CUBES // a + 1)
        for c in range(b, _MOST_CUBES // (a * b) + 1)
    ),
]
_CHIPS = [
    # 16 GB, 197 TFLOP/s: https://docs.cloud.google.com/tpu/docs/v5e
    _tpu("v5e", 15.75, 197, _FLAT),
    # 32 GB, 918 TFLOP/s: https://docs.cloud.google.com/tpu/docs/v6e
    _tpu("v6e", 31.25, 918, _FLAT),
    # 95 GB, 459 TFLOP/s; hosts of four chips: https://docs.cloud.google.com/tpu/docs/v5p
    _tpu("v5p", 95.74, 459, _CUBES),
    # 24 GB, 121 TFLOP/s: https://www.nvidia.com/en-us/data-center/l4/ (242 with sparsity)
    _gpu("l4", 24, 121),
    # 40 and 80 GB, 312 TFLOP/s: https://www.nvidia.com/en-us/data-center/a100/
    _gpu("a100-40", 40, 312),
    _gpu("a100-80", 80, 312),
    # SXM, 80 GB, 989 TFLOP/s: https://www.nvidia.com/en-us/data-center/h100/ (1,979 with sparsity)
    _gpu("h100", 80, 989),
    # SXM, 141 GB, 989 TFLOP/s: https://www.nvidia.com/en-us/data-center/h200/ (1,979 with sparsity)
    _gpu("h200", 141, 989),
]
CHIPS = {chip.name: chip for chip in _CHIPS}
_OTHER_NAMES = {  # GKE's node label, and the first half of Compute Engine's accelerator types
    "tpu-v5-lite-podslice": "v5e",
    "v5litepod": "v5e",
    "tpu-v6e-slice": "v6e",
    "tpu-v5p-slice": "v5p",
    "a100": "a100-80",
}

_MOST = 1e15  # bytes


def topology(text: str) -> Topology:
    """The topology of a name: "v5e:1", "v5e:2x4", "h100:8", "v5p" (the least of it), "gpu:24GiB" (one such GPU).

    Raises `AegisError` for what is unknown, naming what is known.
    """
    own = re.fullmatch(r"gpu:([0-9]+(?:\.[0-9]+)?)(GiB|GB)", text)
    if own:
        memory = float(own[1]) * (GIB if own[2] == "GiB" else 1e9)
        if 0 < memory <= _MOST:
            return Topology(_gpu(text, memory / 1e9, None, (1,)), 1)
        most = f"{_MOST / 1e12:g} TB"
        raise AegisError(f"topology {text:.40}: wanted the memory of a GPU, more than 0 and at most {most}")
    name, _, size = text.partition(":")
    chip = CHIPS.get(_OTHER_NAMES.get(name, name))
    if chip is None:
        raise AegisError(
            f"topology {text!r} is not known; known are {', '.join(CHIPS)} with a number or a shape of chips "
            "(v5e:8, v5e:2x4), and gpu:24GiB"
        )
    if not size:
        return Topology(chip, chip.counts[0])
    if not re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4}){0,2}", size):
        shape = f" or {name}:{chip.shapes[-1]}" if chip.shapes else ""
        raise AegisError(f"topology {text!r}: {size!r} is no number of chips; write {name}:{chip.counts[-1]}{shape}")
    count = _count(size)
    if count not in chip.counts:
        near = [n for n in chip.counts if n < count][-1:] + [n for n in chip.counts if n > count][:1]
        raise AegisError(
            f"topology {text!r}: {chip.name} does not come in {count} chips; nearest is {' or '.join(map(str, near))}"
        )
    if "x" in size and chip.shapes and size not in chip.shapes:
        there = [shape for shape in chip.shapes if _count(shape) == count]
        raise AegisError(f"topology {text!r}: {count} chips of {chip.name} come as {' or '.join(there)}")
    return Topology(chip, count)
