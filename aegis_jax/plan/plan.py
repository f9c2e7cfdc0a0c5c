"""`aegis plan`: whether a run fits on chips that are not there, and what it costs, put together."""

import bisect
import dataclasses

import jax

from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import Pipeline
from aegis_jax.plan import compiled, cost, memory, shapes
from aegis_jax.plan.chips import CHIPS, Topology
from aegis_jax.plan.liveness import LANES
from aegis_jax.run.config import RunConfig

MOST_LANES = 512  # that are looked for


@dataclasses.dataclass(frozen=True)
class Facts:
    """What holds of a run on whatever chip: FLOPs of a step, and sizes for any number of lanes.

    alone, together: phases around the steps of one run, and of lanes (None where runs cannot be lanes).
    """

    run: RunConfig
    flops: cost.Flops
    moments: list[memory.Moment]
    alone: list[memory.Phase]
    together: list[memory.Phase] | None

    def phases(self, lanes: int = 1) -> list[memory.Phase]:
        """Every phase of a run, or of a group of lanes, in the order of time."""
        around = self.alone if lanes == 1 else self.together
        if around is None:
            raise AegisError(f"lanes={lanes}: {refused(self.run)}")
        step = max((moment.phase(lanes) for moment in self.moments), key=lambda phase: phase.total(lanes))
        return [*around[:2], step, *around[2:]]

    def peak(self, lanes: int = 1) -> int:
        """Bytes at the fullest."""
        return max(phase.total(lanes) for phase in self.phases(lanes))

    def most_lanes(self, room: int) -> int:
        """The largest K that fits into so many bytes; 0 where one run does not."""
        counts = range(1, (MOST_LANES if self.together else 1) + 1)
        return bisect.bisect_right(counts, room, key=self.peak)  # more lanes never need less


def refused(run: RunConfig) -> str | None:
    """Why runs of these settings cannot be lanes of one chip, or None."""
    return run.method.without_lanes(run.erase)


def facts(pipeline: Pipeline, run: RunConfig) -> Facts:
    """From the shapes of a pipeline (`shapes.pipeline`) and the settings of a run.

    Raises `AegisError` for settings that cannot be, or that spread a run over several chips.
    """
    run = _settled(run)
    lanes = refused(run) is None
    step = shapes.step(pipeline, run, LANES if lanes else 1)
    alone = memory.around(pipeline, run, step, False)
    together = memory.around(pipeline, run, step, True) if lanes else None
    return Facts(run, cost.flops(step, run, lanes), memory.moments(step), alone, together)


def _settled(run: RunConfig) -> RunConfig:
    """With a concept, for there must be one, and the type that an accelerator computes in."""
    if run.method.cost is None:
        raise AegisError(f"method={run.erase.method} runs on the host, or its steps are not all alike: nothing to plan")
    if run.mesh.data * run.mesh.fsdp > 1:
        raise AegisError("a run that mesh.data or mesh.fsdp spreads over chips is not planned yet: set both to 1")
    settings = run.erase
    if getattr(settings, "compute_dtype", None) == "auto":
        settings = dataclasses.replace(settings, compute_dtype="bfloat16")
    return dataclasses.replace(run, concepts=run.concepts or ("concept",), erase=settings)


def compiled_step(pipeline: Pipeline, run: RunConfig, chip: str, lanes: int, say=lambda text: None) -> dict:
    """The step's fullest moment on an absent TPU chip by its compiler: {"phase", "programs", "collectives"}.

    Programs that need less than a hundredth of the largest are taken as estimated. Of SD 1.4 this takes minutes.
    """
    run = _settled(run)
    device = compiled.absent_chip(chip)
    moments = memory.moments(shapes.step(pipeline, run, lanes))
    own = {id(m.program): m.phase(1).bytes()[memory.PROGRAM] for m in moments}
    done: dict = {}
    for moment in moments:
        if id(moment.program) not in done and own[id(moment.program)] * 100 >= max(own.values()):
            say(f"compiling {moment.name} for {chip} ...")
            done[id(moment.program)] = moment.name, compiled.compile(compiled.lowered(moment.program, device))
    code = sum(c.code for _, c in done.values())
    padded = compiled.Padded(device)
    found = [
        memory.Phase(
            "step",
            {part: padded.size(arrays) for part, arrays in moment.before.items()}
            | {memory.PROGRAM: memory.plain(c.temp + c.output - c.alias), memory.CODE: memory.plain(code)},
            moment.name,
            "compiled",
        )
        for moment in moments
        if (c := done.get(id(moment.program), (None, None))[1]) is not None
    ]
    return {
        "phase": max(found, key=memory.Phase.total),
        "programs": [{"name": name} | dataclasses.asdict(c) for name, c in done.values()],
        "collectives": sum(c.collectives for _, c in done.values()),
    }


def fitting(found: Facts, lanes: int = 1) -> list[str]:
    """The smallest topology of every kind of chip on which so many lanes fit, those with the least memory first."""
    need = found.peak(lanes)
    chips = sorted(CHIPS.values(), key=lambda chip: chip.memory * chip.counts[0])
    return [Topology(chip, chip.counts[0]).name for chip in chips if need <= chip.memory]


def versions() -> dict:
    return {"jax": jax.__version__}
