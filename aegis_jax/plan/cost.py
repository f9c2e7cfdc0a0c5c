"""FLOPs of a step, and what they come to in hours and in money. What is assumed is named; nothing here was timed."""

import dataclasses
import math

import numpy as np

from aegis_jax.plan import count
from aegis_jax.plan.chips import Topology
from aegis_jax.plan.liveness import LANES
from aegis_jax.plan.shapes import Step
from aegis_jax.run.config import RunConfig

# Share of the peak that a forward pass of SD 1.4's UNet reached on one H200, by the number of latents in it
# (docs/performance.md, benchmarks/results/gpu_first_h200.json): what is assumed of every chip, and of backward passes.
MEASURED = {1: 0.10, 2: 0.16, 8: 0.30, 16: 0.36, 32: 0.39}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one step of one run, on average: in guided sampling, and in all other programs, by name.

    forward: one UNet forward pass at batch 1.
    """

    sampling: float
    programs: dict[str, float]
    forward: float

    @property
    def total(self) -> float:
        return self.sampling + sum(self.programs.values())


def flops(step: Step, run: RunConfig, lanes: bool) -> Flops:
    """Of a run, from the programs of its step (of LANES runs if `lanes`).

    A loop as long as chance will have it (guided sampling from a random stop, the pools' redrawing) is counted by the
    method's own account of its UNet evaluations on average.
    """
    programs, forward, counted = {}, 0.0, {}
    for call in step.traced.calls:
        if id(call.program) not in counted:
            counted[id(call.program)] = [each / LANES if lanes else each for each in count.flops(call.program)]
        fixed, turn = counted[id(call.program)]
        if call.name == "predicted":
            forward = fixed / call.outputs[0].aval.shape[0]
        if fixed and not turn:
            programs[call.name] = programs.get(call.name, 0.0) + fixed
    sampling = 0.0
    if run.method.cost is not None:
        sampling = run.method.cost(run.erase, max(len(run.concepts), 1)).latents * forward
    return Flops(sampling, programs, forward)


def utilisation(latents: int) -> float:
    """The assumed share of a chip's peak with so many latents in a call: `MEASURED`, by the logarithm in between."""
    known = sorted(MEASURED)
    return float(np.interp(math.log(latents), [math.log(n) for n in known], [MEASURED[n] for n in known]))


@dataclasses.dataclass(frozen=True)
class Bill:
    """What N concepts take on a topology.

    Attributes:
      share: of the peak, assumed. seconds: of a step of all K lanes. steps_per_hour: of one chip, each step of K runs.
      concepts_per_hour: of one chip. hours: from first to last, in waves of chips x K. chip_hours: all chips, to the
      end, idle ones too. dollars: for those, None without a price.
    """

    share: float
    seconds: float
    steps_per_hour: float
    concepts_per_hour: float
    concepts: int
    hours: float
    chip_hours: float
    dollars: float | None


def unknown(run: RunConfig, topology: Topology, share: float | None) -> str | None:
    """Why nobody can say how long a run takes, or None."""
    if topology.chip.flops is None:
        return "this chip's peak is not"
    if share is None and getattr(run.erase, "compute_dtype", None) == "float32":
        return "the peak is of bfloat16, not of float32; --utilisation gives the share of it that float32 reaches"
    return None


def bill(
    flops: float, run: RunConfig, topology: Topology, lanes: int, concepts: int, price: float | None, share=None
) -> Bill | None:
    """flops: of one step of one run; price: dollars per chip-hour; share: of the peak, by default `utilisation`.

    None where `unknown` says why. Starting, loading, compiling, exporting and pictures are not in it.
    """
    if unknown(run, topology, share):
        return None
    # In low memory backward passes have one latent at a time; forward passes do better than that.
    together = 1 if getattr(run.erase, "low_memory", False) else getattr(run.erase, "batch", 1)
    share = utilisation(lanes * together) if share is None else share
    seconds = lanes * flops / (share * topology.chip.flops)
    run_hours = run.erase.steps * seconds / 3600
    hours = math.ceil(concepts / (lanes * topology.count)) * run_hours
    chip_hours = hours * topology.count
    return Bill(
        share, seconds, 3600 / seconds, lanes / run_hours, concepts, hours, chip_hours,
        None if price is None else price * chip_hours,
    )  # fmt: skip
