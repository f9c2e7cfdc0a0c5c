"""What the arguments of `erase` ask for, as a run's settings, and which of these make two runs the same."""

import dataclasses
from collections.abc import Iterable

from aegis_jax import worlds
from aegis_jax.erasure.presets import SCALE, SCALE_OF_LATENTS, preset
from aegis_jax.erasure.texts import folded
from aegis_jax.errors import AegisError
from aegis_jax.io.hub import place
from aegis_jax.io.pipeline import Pipeline
from aegis_jax.models.model import compute_dtype
from aegis_jax.run import config as run_config
from aegis_jax.run.checkpoint import refuse_other
from aegis_jax.run.config import RunConfig


def settings(pipeline, concepts, config, overrides=(), saved: RunConfig | None = None) -> RunConfig:
    """The settings that the arguments of `erase` ask for; saved: those of the run to go on with.

    Raises `AegisError` for arguments and values of other types, and for values out of range.
    """
    given, overrides = {}, run_config.pairs(overrides)
    if isinstance(pipeline, Pipeline):
        given["model"] = place(pipeline.source.folder.path) if pipeline.source else ""
    elif pipeline is not None:
        given["model"] = place(pipeline)
    if concepts is not None:
        several = isinstance(concepts, Iterable) and not isinstance(concepts, str)
        given["concepts"] = list(concepts) if several else [concepts] if isinstance(concepts, str) else concepts
    if saved:  # a config file names the model it was written for, which the run need not have had
        given = {key: getattr(saved, key) for key in ("model", "revision", "variant")} | given
    if config is None:
        asked = run_config.merge(RunConfig(), given, [(key, text) for key, text in overrides if key == "model"])
        run = saved or run_config.load(asked.model if asked.model in worlds.NAMES else None)
    elif isinstance(config, RunConfig):
        run = config
        _check(run.erase)
    elif isinstance(config, dict):
        entries = run_config.flat(config)
        if saved and entries.get("method") == saved.erase.method:  # it is that already, with the run's own settings
            del entries["method"]
        run = run_config.merge(saved or RunConfig(), entries)
    elif dataclasses.is_dataclass(config) and hasattr(config, "method") and not isinstance(config, type):
        _check(config)
        run = dataclasses.replace(saved or RunConfig(), erase=config)
    else:
        run = run_config.load(config)
    if saved and not run.concepts:
        run = dataclasses.replace(run, concepts=saved.concepts)
    run = on_this_device(run_config.merge(run_config.typed(run), given, overrides))
    concepts = each_once(run.concepts)
    if saved and each_once(saved.concepts) == concepts:  # by an older version that kept spaces and repeats
        concepts = saved.concepts
    run = dataclasses.replace(run, concepts=concepts)
    if not (run.model or isinstance(pipeline, Pipeline)):
        raise AegisError("no model given: name a diffusers folder, a hub id, world or canvas")
    if not run.concepts:
        raise AegisError("no concept given: name at least one, such as star")
    if saved:
        refuse_other("this run", computed(saved), computed(run))
    return run


def each_once(concepts: Iterable[str]) -> tuple[str, ...]:
    """Concepts without the spaces around their names; one that is there twice, in whatever case, would count twice."""
    found = {}
    for text in concepts:
        found.setdefault(folded(text) or text, text.strip() or text)
    return tuple(found.values())


def _check(erase) -> None:
    """Raises `AegisError` for settings that are not of their preset's classes, in which some of what makes it lies, or
    that have its name and nothing of what makes it."""
    wanted = preset(erase.method).settings
    pairs = [(erase, wanted)] + [
        (getattr(erase, f.name), getattr(wanted, f.name))
        for f in dataclasses.fields(wanted)
        if dataclasses.is_dataclass(getattr(wanted, f.name)) and dataclasses.is_dataclass(getattr(erase, f.name, None))
    ]
    for found, right in pairs:
        if type(found) is not type(right):
            raise AegisError(
                f"method={erase.method} has settings of class {type(right).__name__}, got {type(found).__name__}; "
                f"{_instead(erase.method)}"
            )
    of = preset(erase.method)
    usual, wanted, found = (run_config.flat(dataclasses.asdict(each)) for each in (type(erase)(), of.settings, erase))
    scale = {*SCALE, *(f"latents.{key}" for key in SCALE_OF_LATENTS), "method"} - of.own
    makes = [key for key in wanted if key not in scale and wanted[key] != usual.get(key)]
    if makes and all(found.get(key) == usual.get(key) for key in makes):
        raise AegisError(
            f"{type(erase).__name__}(method={erase.method!r}) has none of that preset's settings ({', '.join(makes)}), "
            f"so it would be another method under its name; {_instead(erase.method)}"
        )


def _instead(name: str) -> str:
    return f"give config={{'method': {name!r}, ...}}, or change aegis_jax.erasure.presets.preset({name!r}).settings"


def on_this_device(run: RunConfig) -> RunConfig:
    """What "auto" means here, in its stead: a run keeps what it was started with, wherever it goes on."""
    if not hasattr(run.erase, "compute_dtype"):
        return run
    name = compute_dtype(run.erase.compute_dtype).name
    return dataclasses.replace(run, erase=dataclasses.replace(run.erase, compute_dtype=name))


def computed(run: RunConfig) -> dict:
    """The settings that the result depends on, for telling one run from another."""
    kept = run_config.values(dataclasses.replace(RunConfig(), erase=run.erase))
    own = run_config.values(run)
    names = {field.name for field in dataclasses.fields(RunConfig)} - {"erase"}
    kept = {key: own[key] for key in kept if key.partition(".")[0] not in names}
    return {"concepts": list(run.concepts), **kept}


def defaults(run) -> dict:
    """What `computed` gives for the method's own settings: a checkpoint older than one of them resumes with these."""
    return computed(dataclasses.replace(RunConfig(), erase=run.method.settings))
