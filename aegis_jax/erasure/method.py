"""What an erasure method is: how it starts, steps and changes a pipeline, and what of it `run` must know besides.

A room of this folder offers one of these. `run` knows none by name: it starts one, steps until the settings say enough,
and exports what changed. A closed form is a method whose settings have `steps == 1`. What a method needs beyond the
pipeline and the concepts (retention prompts, pictures) is a setting of its own, which `check` and `start` look at.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How runs of a method go through one batch, each with concepts of its own (lanes.py).

    Attributes:
      start: (pipeline, the concepts of each run, settings) -> [(state, frozen), ...]: as `Method.start` gives each, but
        what is not the concepts' own is one array in all runs. States may share arrays too, counts and flags among them
        have the same values, and all shapes are equal.
      refused: settings -> why these would gain nothing by it, or None.
    """

    start: Callable
    refused: Callable


@dataclasses.dataclass(frozen=True)
class Method:
    """An erasure method.

    Attributes:
      settings: its settings with their defaults, a frozen dataclass with at least `method` (the preset's name),
        `steps` and `seed`.
      check: settings -> None; raises `AegisError` naming every value that is out of range.
      start: (pipeline, concepts, settings, placement) -> (state, frozen): the first state, a pytree that a checkpoint
        holds, and what the steps never change; `jax.eval_shape` can follow it over the pipeline's parameters. Raises
        `AegisError` for a pipeline or a concept that does not fit.
      step: (state, frozen, settings) -> (state, metrics), which `jax.eval_shape` can follow; metrics are scalars, "L_e"
        among them, and may hold "per_tensor", {name: (number of changed tensors,)}.
      drift: (pipeline, state, settings) -> {component: {leaf path: array}}: what is to be added, in float32, to which
        parameters of the pipeline. The inner mapping may make an array when it is asked for, since all at once are as
        large as the model; it must not hold the state.
      described: (settings, number of concepts) -> what a run of these settings does, in a sentence or two for its card.
      tensors: (pipeline, settings) -> PyTorch keys of the changed tensors, in the order of "per_tensor".
      remedy: what to change where a loss or the state stops being finite, after "stopped; ".
      smaller: what to change where a device's memory does not hold a run, after "full; ".
      lanes: how runs share a batch, or None for a method whose runs do not.
      check_concepts: (pipeline, concepts, settings) -> None; raises `AegisError` for concepts that `start` would
        refuse, in a moment; or None.
      cost: (settings, number of concepts) -> UNet evaluations of a step (erasure.aegis.cost.Cost), or None.
    """

    settings: Any
    check: Callable
    start: Callable
    step: Callable
    drift: Callable
    described: Callable
    tensors: Callable
    remedy: str
    smaller: str
    lanes: Lanes | None = None
    check_concepts: Callable | None = None
    cost: Callable | None = None

    def without_lanes(self, settings) -> str | None:
        """Why runs of these settings do not share a batch, or None."""
        return self.lanes.refused(settings) if self.lanes else f"method={settings.method} has none"
