"""A run as shapes: its pipeline, its first state and frozen side, and the compiled programs of its step. No weight is
read and nothing large is made."""

import dataclasses
import functools

import jax
import numpy as np

from aegis_jax.erasure import lanes as lanes_lib
from aegis_jax.erasure.batched import Batched, traced
from aegis_jax.errors import AegisError
from aegis_jax.io import folder, hub
from aegis_jax.io.pipeline import MODELS, Pipeline
from aegis_jax.io.tokenizer import Tokenizer
from aegis_jax.models import model
from aegis_jax.plan import stable_diffusion
from aegis_jax.run.config import RunConfig


class _Tokenizer:
    """Ids of the right number; their values do not matter to shapes."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 2

    def __init__(self, text_config: dict):
        self.model_max_length = text_config["max_position_embeddings"]
        self.word_ids = np.arange(10, text_config["vocab_size"])

    def tokens(self, text: str) -> list[int]:
        return [10]

    def ids(self, prompts) -> np.ndarray:
        return np.full((1 if isinstance(prompts, str) else len(prompts), self.model_max_length), 2)


def pipeline(name: str, *, revision: str | None = None, variant: str | None = None) -> Pipeline:
    """A pipeline whose parameters are `jax.ShapeDtypeStruct`, float32 as a run loads them.

    name: sd14, sd21, or what `load_pipeline` takes; of a folder only the configs are read. Raises `AegisError` for what
    is no pipeline.
    """
    known = stable_diffusion.MODELS.get(name)
    if known is not None:
        return of_configs(**known)
    found = folder.examine(hub.locate(name, revision=revision, variant=variant), variant)
    configs = {part: found.components[part].config for part in ("unet", "vae", "text_encoder", "scheduler")}
    made = of_configs(**configs)
    table = made.text_encoder.params["text_model"]["embeddings"]
    limit, vocabulary = (table[f"{kind}_embedding"]["embedding"].shape[0] for kind in ("position", "token"))
    return dataclasses.replace(made, tokenizer=Tokenizer(found.path / "tokenizer", limit=limit, vocabulary=vocabulary))


def of_configs(unet: dict, vae: dict, text_encoder: dict, scheduler: dict) -> Pipeline:
    """The same from the contents of config files."""
    configs = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    models = {name: model.abstract(MODELS[name], config) for name, config in configs.items()}
    return Pipeline(**models, tokenizer=_Tokenizer(text_encoder), scheduler=scheduler)


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step as shapes.

    Attributes:
      single: state of one run. state, frozen: what the step takes; with K > 1 lanes those of all (erasure.lanes.stack).
      traced: its compiled programs in order.
    """

    single: object
    state: object
    frozen: object
    traced: Batched


def step(pipeline: Pipeline, run: RunConfig, lanes: int = 1) -> Step:
    """The training step of a run on one device, or of K runs at once on one.

    Raises `AegisError` for settings that cannot be.
    """
    method, settings = run.method, run.erase
    if lanes > 1:
        if refused := method.without_lanes(settings):
            raise AegisError(f"lanes={lanes}: {refused}")
    single, frozen, own = _started(pipeline, run, lanes)
    axes = (lanes_lib.varies(single), own) if lanes > 1 else jax.tree.map(lambda _: False, (single, frozen))
    state, frozen = jax.tree.map(lambda x, flag: _struct(x, (lanes,) * flag), (single, frozen), axes)

    def wanted(shapes):
        new, metrics = shapes
        flags = lanes_lib.varies(new) if lanes > 1 else jax.tree.map(lambda _: False, new)
        return flags, jax.tree.map(lambda _: lanes > 1, metrics)

    function = functools.partial(method.step, config=settings)
    return Step(single, state, frozen, traced(function, (state, frozen), axes, wanted))


def _struct(x, more: tuple = ()):
    return jax.ShapeDtypeStruct((*more, *x.shape), x.dtype)


def _started(pipeline: Pipeline, run: RunConfig, lanes: int):
    """(state, frozen, which arrays of it are a run's own) at step 0."""
    models = {name: getattr(pipeline, name) for name in MODELS}
    own = []

    def start(params):
        built = {name: model.Model(m.config, m.graph, params[name]) for name, m in models.items()}
        given = dataclasses.replace(pipeline, **built)
        if lanes == 1:
            return run.method.start(given, list(run.concepts), run.erase, None)
        # An array that two runs do not share is a run's own.
        first, second = run.method.lanes.start(given, [list(run.concepts)] * 2, run.erase)
        own.append(jax.tree.map(lambda x, y: x is not y, first[1], second[1]))
        return first

    state, frozen = jax.eval_shape(start, {name: m.params for name, m in models.items()})
    return state, frozen, own[0] if own else None
