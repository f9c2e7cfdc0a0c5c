"""Bytes on one chip in every phase of a run, by what they are for.

A run's peak is not always in its step: the pictures at its end need a pipeline, whole and in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion import sample, schedule
from aegis_jax.diffusion.conditioning import Conditioning
from aegis_jax.erasure.batched import Program
from aegis_jax.io.pipeline import Pipeline
from aegis_jax.models import vae as vae_lib
from aegis_jax.models.model import flatten
from aegis_jax.plan.liveness import NOTHING, at, peak, size, timeline
from aegis_jax.plan.shapes import Step
from aegis_jax.run import picture
from aegis_jax.run.config import RunConfig

# What the fields of a state and of a frozen side are called here; the others are "rest".
_CALLED = {
    "unet": "theta0", "low_bits": "theta0's low bits", "text": "text encoder",
    "drift": "drift", "opt_state": "optimiser", "latents": "pool",
}  # fmt: skip
THETA, PROGRAM, CODE, REST = "working theta", "activations and gradients", "code", "rest"
# The compiled programs themselves, where no compiler was asked: those of benchmarks/results/tpu_v5e.json are 0.38 GiB.
CODE_ASSUMED = 2**29


@dataclasses.dataclass(frozen=True)
class Phase:
    """What lies on the chip in a phase of a run, at its fullest: sizes by what they are for, `split` into lanes.

    during: at which of the phase's programs that is; how: estimate, or compiled.
    """

    name: str
    parts: dict[str, np.ndarray]
    during: str = ""
    how: str = "estimate"

    def bytes(self, lanes: int = 1) -> dict[str, int]:
        return {name: int(at(each, lanes)) for name, each in self.parts.items()}

    def total(self, lanes: int = 1) -> int:
        return sum(self.bytes(lanes).values())


@dataclasses.dataclass(frozen=True)
class Moment:
    """A call of a program of the step.

    Attributes:
      before: arrays that lie there before it, by part. fresh: size of its results, less what they take over of donated
        arrays. temporaries: (T, 2).
    """

    name: str
    program: Program
    before: dict[str, list]
    fresh: np.ndarray
    temporaries: np.ndarray

    @functools.cached_property
    def parts(self) -> dict[str, np.ndarray]:
        return {name: _sum(arrays) for name, arrays in self.before.items()}

    def phase(self, lanes: int) -> Phase:
        own = peak(self.temporaries, lanes) + self.fresh
        return Phase("step", self.parts | {PROGRAM: own, CODE: plain(CODE_ASSUMED)}, self.name)


def moments(step: Step) -> list[Moment]:
    """Every call of the step's programs, in order."""
    there = dict(zip(step.traced.inputs, _named((step.state, step.frozen)), strict=True))  # {variable: (part, array)}
    needs, found = {}, []
    for call in step.traced.calls:
        if id(call.program) not in needs:
            needs[id(call.program)] = timeline(call.program)
        temporaries, results = needs[id(call.program)]
        donated = [call.inputs[i] for i in call.program.donated]
        before: dict = {}
        for part, array in there.values():
            before.setdefault(part, []).append(array)
        fresh = _sum(results) - _reused([there[v][1] for v in donated], results)
        found.append(Moment(call.name, call.program, before, fresh, temporaries))
        # The caller keeps what it gave, but for what was donated; the rest of a step goes when it was last read.
        for variable in call.dead:
            if variable in donated or variable not in step.traced.inputs:
                there.pop(variable, None)
        made = THETA if call.name == "_moved" else REST
        there |= {v: (made, array) for v, array in zip(call.outputs, results) if v not in call.dead}
    return found


def plain(nbytes: int) -> np.ndarray:
    """A size that is one for all the lanes there are."""
    return np.array([nbytes, 0], np.int64)


def _reused(donated: list, results: list) -> np.ndarray:
    """What results take over of donated arrays: those of their shape and type."""
    left, total = [(x.shape, x.dtype) for x in donated], NOTHING
    for array in results:
        if (array.shape, array.dtype) in left:
            left.remove((array.shape, array.dtype))
            total = total + size(array)
    return total


def _sum(arrays) -> np.ndarray:
    return sum(map(size, arrays), NOTHING)


def _named(trees: tuple) -> list[tuple]:
    """(part, array) of every array of a state and a frozen side, in the order of their leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return [(_CALLED.get(path[1].name, REST), leaf) for path, leaf in leaves]


def resident(step: Step) -> dict[str, np.ndarray]:
    """State and frozen side, what lies there between two steps, by part."""
    parts: dict = {}
    for name, array in _named((step.state, step.frozen)):
        parts[name] = parts.get(name, NOTHING) + size(array)
    return parts


def around(pipeline: Pipeline, run: RunConfig, step: Step, lanes: bool) -> list[Phase]:
    """The phases before and after the steps.

    Without lanes those of `aegis erase`, a resumed run's among them; with lanes those of a group of `erase_lanes`,
    which hands on its results by way of the host.
    """
    there = resident(step)
    one = max(map(size, flatten(pipeline.unet.params).values()), key=lambda each: at(each, 1))
    whole = {name: _whole(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")}
    named = {"UNet, float32": whole["unet"], "VAE": whole["vae"], "text encoder": whole["text_encoder"]}
    load = Phase("load", named, "the pipeline, before UNet and VAE go to the host")
    if lanes:
        single = _sum(jax.tree.leaves(step.single))
        start = Phase("start", there | {"a single run's state": single}, "states are stacked")
        results = Phase(
            "results", there | {"one lane's drift": _sum(jax.tree.leaves(step.single.drift))}, "a lane goes to the host"
        )
        return [load, start, results]
    resume = Phase("resume", there | {"one tensor": 2 * one}, "the checkpoint is read")
    save = Phase("checkpoint", there, "the state goes to the host")
    text = {"text encoder": whole["text_encoder"]}
    export = Phase("export", {"drift": there["drift"], **text, "one tensor": 2 * one}, "tensors are written")
    both = {f"{name}, before and after": 2 * each for name, each in named.items()}
    result = Phase("result", both, "both pipelines, as they are handed over")
    if not run.picture.images:
        return [load, resume, save, export, result]
    texts = "text encoder, before and after"
    drawn = {name: each for name, each in named.items() if name != "text encoder"} | {texts: both[texts]}
    drawn[PROGRAM] = _pictures(pipeline, run)
    return [load, resume, save, export, Phase("pictures", drawn, "sampling, a pipeline at a time"), result]


def _whole(model) -> np.ndarray:
    """A component in float32, as it is loaded."""
    return plain(sum(4 * leaf.size for leaf in flatten(model.params).values()))


def _pictures(pipeline: Pipeline, run: RunConfig) -> np.ndarray:
    """What sampling needs while it denoises or decodes, beside the pipelines."""
    shape = sample.latent_shape(pipeline)
    images = (max(len(run.concepts), 1) + picture.KEPT_ROWS) * run.picture.images
    batch = max(1, min(images, sample.LATENT_PIXELS_PER_CALL // (shape[0] * shape[1]), sample.MOST_IMAGES_PER_CALL))
    z = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    text = pipeline.text_encoder.params["text_model"]
    length = text["embeddings"]["position_embedding"]["embedding"].shape[0]
    cond = Conditioning(jax.ShapeDtypeStruct((batch, length, text["final_layer_norm"]["bias"].shape[0]), jnp.float32))
    steps = schedule.make_schedule(pipeline.scheduler)
    grid = np.arange(run.picture.steps, dtype=np.int32)
    unet, vae = pipeline.unet, pipeline.vae

    def denoise(params, cond, uncond, z):
        return sample.sample_latents(unet.graph, params, steps, cond, uncond, z, grid, run.picture.guidance)

    programs = [
        Program(jax.jit(denoise), [unet.params, cond, cond, z], []),
        Program(jax.jit(functools.partial(vae_lib.decode, vae.graph)), [vae.params, z], []),
    ]
    return max((peak(timeline(program)[0], 1) for program in programs), key=lambda each: at(each, 1))
