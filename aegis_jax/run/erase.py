"""`aegis_jax.erase`: from a pipeline to an erased, exported pipeline; resumable at any step."""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.erasure.programs import compile_ahead
from aegis_jax.errors import AegisError
from aegis_jax.io import convert
from aegis_jax.io.destination import remove_leftovers
from aegis_jax.io.export import check_complete, save_pipeline, written_bytes
from aegis_jax.io.pipeline import Pipeline, load_pipeline
from aegis_jax.models.model import Model, flatten, unflatten
from aegis_jax.parallel import processes
from aegis_jax.parallel.mesh import make_placement
from aegis_jax.run import card, loop, manifest, picture
from aegis_jax.run.asked import computed, defaults, settings
from aegis_jax.run.checkpoint import Checkpoints, refuse_other
from aegis_jax.run.config import RunConfig
from aegis_jax.run.folder import MetricsFile, RunFolder, device_errors, disk_errors, write_json, write_text
from aegis_jax.run.progress import Progress, Silent
from aegis_jax.run.tensors import TensorLog


@dataclasses.dataclass(frozen=True)
class EraseResult:
    """What an erasure gives.

    Attributes:
      pipeline: the erased pipeline. With a run folder it is the exported one, read back: exactly
        what others will load.
      metrics: one dict per step; "step" counts from 1.
      per_tensor: {name: (steps, trained tensors)}, see run.tensors; NaN for steps whose rows are lost, {} if all are.
      tensors: PyTorch keys of the trained tensors, the columns of `per_tensor`.
      folder: the run folder, or None.
      run: the settings.
      original: the pipeline before.
      measured: what `measure` said, or None.
    """

    pipeline: Pipeline
    metrics: list[dict]
    per_tensor: dict
    tensors: list[str]
    folder: Path | None
    run: RunConfig
    original: Pipeline
    measured: str | None = None


def erase(
    pipeline=None,
    concepts=None,
    *,
    config=None,
    overrides=(),
    out=None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    measure: Callable[[RunConfig, Pipeline, Pipeline], str | None] | None = None,
) -> EraseResult:
    """Erases concepts, given by name, from a pipeline.

    pipeline: a `Pipeline`, or what `load_pipeline` takes. concepts: a text or a list of texts.
    config: a method's settings such as `EraseConfig`, a `RunConfig`, a config file or the name of
    one of ours, or a dict of config keys; by default the preset `paper`, and for the world its own
    config.
    overrides: (key, text) pairs on top, as on the command line. out: the run folder; without it
    nothing is written. resume: go on with the run in `out` from its newest checkpoint; what is not
    given is taken from that folder. overwrite: replace the run in `out`. progress: for example
    `run.progress.Progress()`; silent without. measure(run, original, erased): text for the model
    card and the result, computed after the export.

    Same seed, settings and kind of device: same result, interrupted or not. On a CPU that is bit for bit; on a GPU
    sums whose order is not fixed and kernels chosen by trial can round otherwise from one process to the next.
    compute_dtype "auto" is settled when a run starts, and stays. Raises `AegisError` for bad input before anything is
    written, and for a device whose memory is full, `loop.NonFiniteError` if a loss or the state stops being finite, and
    `loop.Interrupted` after SIGTERM or SIGINT, the state saved.
    """
    progress = progress if progress and processes.is_first() else Silent()
    if out is None and (resume or overwrite):
        raise AegisError("resume and overwrite need out: the run folder")
    folder = RunFolder(out) if out is not None else None
    claimed = (
        functools.partial(folder.claimed, resume=resume, overwrite=overwrite) if folder else contextlib.nullcontext
    )
    with processes.first_holds(claimed):
        saved = processes.agreed(folder.reopen) if resume else None
        run = processes.agreed(lambda: settings(pipeline, concepts, config, overrides, saved))
        processes.same("setting", computed(run))
        with device_errors(run.method.smaller):
            if not isinstance(pipeline, Pipeline):
                pipeline = processes.agreed(lambda: _loaded(run))
            if folder is None:
                result = _in_memory(run, pipeline, progress)
                measured = measure(run, pipeline, result.pipeline) if measure else None
                return dataclasses.replace(result, measured=measured)
            processes.agreed(lambda: folder.check_apart(pipeline))
            with disk_errors(folder.path):
                return _in_folder(run, pipeline, folder, resume, progress, measure)


def _loaded(run: RunConfig) -> Pipeline:
    return off_device(load_pipeline(run.model, revision=run.revision or None, variant=run.variant or None))


def _in_full(pipeline: Pipeline, name: str) -> Model:
    """A component in float32. What was loaded in fewer bits is read again, else its rounding would be exported too."""
    model = getattr(pipeline, name)
    leaves = flatten(model.params)
    if pipeline.source is None or all(leaf.dtype == np.float32 for leaf in leaves.values()):
        return model
    headers = pipeline.source.folder.components[name].weights.headers
    read = flatten(convert.read(model, pipeline.source.origins[name], headers, jnp.float32).params)
    # A tensor that was changed since it was loaded stays as it is.
    same = {path: bool(jnp.array_equal(read[path].astype(leaf.dtype), leaf)) for path, leaf in leaves.items()}
    params = unflatten({path: read[path] if same[path] else leaf for path, leaf in leaves.items()})
    return dataclasses.replace(model, params=params)


def _start(run, pipeline, progress):
    """(state at step 0, step function)."""
    if len(pipeline.tokenizer.word_ids) > 1000:  # to encode a sample of them takes a large model on a CPU half a minute
        progress.say("preparing: encoding words and prompts ...")

    def begin():
        # Not needed before the export, but what is wrong with its file is to be told now.
        pipeline.vae.params  # noqa: B018
        placement = make_placement(run.mesh.data, run.mesh.fsdp)
        return run.method.start(pipeline, list(run.concepts), run.erase, placement)

    state, frozen = processes.agreed(begin)
    return state, functools.partial(run.method.step, frozen=frozen, config=run.erase)


def _compile(step_fn, state) -> None:
    """All programs of a step, on all cores; those of arrays that are bound to devices are left to the first step."""
    if not any(isinstance(x, jax.Array) and x.committed for x in jax.tree.leaves((state, step_fn.keywords))):
        compile_ahead(step_fn, state)


def trained(run, pipeline, progress, *, is_compiled: bool = False) -> tuple[dict, list[dict], TensorLog]:
    """(what is to be added to the pipeline's parameters, metrics, per-tensor rows) of a run without a folder.

    is_compiled: this process has trained such a run already, so that its programs are there.
    Raises `AegisError` and `loop.NonFiniteError` as `erase` does.
    """
    state, step_fn = _start(run, pipeline, progress)
    metrics, log = [], TensorLog(run.method.tensors(pipeline, run.erase))

    def record(step, values, per_tensor, seconds):
        metrics.append({"step": step, "method": run.erase.method, **values})
        log.append(per_tensor)
        progress.update(step, values["L_e"])

    progress.start(0, run.erase.steps, is_compiled)
    if not is_compiled:
        _compile(step_fn, state)
    state = loop.train(step_fn, state, done=0, steps=run.erase.steps, record=record, remedy=run.method.remedy)
    return _drift(run, pipeline, state), metrics, log


def _drift(run, pipeline, state) -> dict:
    """What is to be added to the pipeline's parameters; of arrays that lie on several processes' devices, the whole."""
    drift = run.method.drift(pipeline, state, run.erase)
    if not processes.several():
        return drift
    return {name: {path: processes.on_host(moves[path]) for path in moves} for name, moves in drift.items()}


def _in_memory(run, pipeline, progress) -> EraseResult:
    drift, metrics, log = trained(run, pipeline, progress)
    erased = with_drift(pipeline, drift)
    del drift
    return EraseResult(on_device(erased), metrics, log.arrays(), log.names, None, run, on_device(pipeline))


def _in_folder(run, pipeline, folder, resume, progress, measure) -> EraseResult:
    origin = processes.agreed(lambda: manifest.identity(pipeline))
    processes.same("model", origin)
    story = processes.first(folder.read_manifest) if resume else {}
    if story:
        processes.agreed(lambda: refuse_other(folder.path, manifest.identity_of(story, origin), origin))
    if story.get("status") == "finished":
        progress.say(f"{folder.path} is finished already")
        erased = processes.agreed(lambda: load_pipeline(folder.pipeline))
        log = _tensor_log(run, pipeline, folder, run.erase.steps)
        return EraseResult(erased, folder.read_metrics(), log.arrays(), log.names, folder.path, run, pipeline)
    processes.agreed(lambda: check_complete(pipeline))
    if run.picture.images:
        processes.agreed(lambda: picture.check(pipeline, run.picture))
    state, step_fn = _start(run, pipeline, progress)
    story = processes.first(functools.partial(_begun, run, pipeline, state, folder, origin, resume, story))
    drift = _drift(run, pipeline, _train(run, pipeline, state, step_fn, folder, origin, story, progress))
    del state, step_fn  # the export needs none of it
    progress.say(f"writing {folder.pipeline}")
    processes.first(functools.partial(_export, run, pipeline, drift, folder))
    del drift
    before = processes.agreed(lambda: _before(run, pipeline, folder, progress) if processes.is_first() else None)
    erased = processes.agreed(lambda: load_pipeline(folder.pipeline))
    if run.picture.images:
        processes.first(lambda: picture.save(before, picture.sampled(erased, run), folder.picture, run))
    pipeline = on_device(pipeline)
    measured = processes.first(lambda: _look(run, pipeline, erased, folder, story, measure))
    metrics, log = folder.read_metrics(), _tensor_log(run, pipeline, folder, run.erase.steps)
    return EraseResult(erased, metrics, log.arrays(), log.names, folder.path, run, pipeline, measured)


def _begun(run, pipeline, state, folder, origin: dict, resume: bool, story: dict) -> dict:
    """The manifest of a run that may now write into its folder."""
    remove_leftovers(folder.pipeline)
    _check_space(run, pipeline, state, folder, resume)
    if not resume:
        folder.create(run)
    if story:
        return story | {"resumed": [*story["resumed"], manifest.now()]}
    return manifest.describe(run, pipeline, origin)


def _before(run, pipeline, folder, progress) -> np.ndarray | None:
    """The picture's images before erasure. On an accelerator the pipeline is there for as long as they are sampled:
    with the erased one beside it sampling SD 2.1 at 768 pixels would not fit a chip of 16 GiB."""
    if not run.picture.images:
        return None
    progress.say(f"sampling {folder.picture}{picture.caption(run)}")
    return picture.sampled(on_device(pipeline), run)


def _look(run, pipeline, erased, folder, story: dict, measure) -> str | None:
    """What `measure` says, and the manifest's last lines."""
    measured = None
    if measure:
        measured = measure(run, pipeline, erased)
        write_text(folder.pipeline / "README.md", card.text(run, folder.read_metrics(), measured))
    story |= {"status": "finished", "finished": manifest.now()}
    story["result"] = manifest.folder_hashes(folder.pipeline)
    write_json(folder.manifest, story)
    return measured


def _tensor_log(run, pipeline, folder, done: int) -> TensorLog:
    log = TensorLog(run.method.tensors(pipeline, run.erase))
    log.read(folder.per_tensor, done)
    return log


def _check_space(run, pipeline, state, folder, resume: bool):
    """Before anything is written: room for the result and as many checkpoints as will lie there at once.

    A resumed run has all of them but one already.
    """
    count = min(run.checkpoint.keep + 1, -(-run.erase.steps // run.checkpoint.every))
    count = 1 if resume else count
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) * count + written_bytes(pipeline)
    folder.check_space(needed, count)


def _older(run, origin: dict) -> dict:
    """What holds for a checkpoint that is older than a setting, or than the record of the tokenizer."""
    return {manifest.TOKENIZER: origin[manifest.TOKENIZER], **defaults(run)}


def _train(run, pipeline, state, step_fn, folder, origin, story, progress):
    """The loop with its checkpoints and metrics; returns the last state."""
    with Checkpoints(
        folder.checkpoints, origin | computed(run), run.checkpoint.keep, _older(run, origin)
    ) as checkpoints:
        done = checkpoints.latest or 0
        processes.same(f"{folder.checkpoints} (do their hosts share it?)", {"steps done": done})
        if done:
            state = processes.agreed(lambda: checkpoints.restore(state))
            progress.say(f"going on after step {done}")
        processes.first(lambda: write_json(folder.manifest, story))
        log = processes.agreed(lambda: _tensor_log(run, pipeline, folder, done))
        with processes.first_holds(lambda: MetricsFile(folder.metrics, done, run.erase.method)) as metrics:

            def record(step, values, per_tensor, seconds):
                if metrics:
                    metrics.write(step, values, seconds)
                log.append(per_tensor)
                progress.update(step, values["L_e"])

            def save(step, state):
                if metrics:
                    metrics.sync()
                    log.write(folder.per_tensor)
                checkpoints.save(step, state)

            progress.start(done, run.erase.steps)
            if done < run.erase.steps:
                _compile(step_fn, state)
            try:
                return loop.train(
                    step_fn, state, done=done, steps=run.erase.steps,
                    record=record, save=save, every=run.checkpoint.every, remedy=run.method.remedy,
                )  # fmt: skip
            except (loop.Interrupted, loop.NonFiniteError) as stopped:
                checkpoints.wait()
                progress.say(f"the newest checkpoint is of step {checkpoints.latest or 0}")
                story["status"] = f"stopped: {stopped}"
                processes.first(lambda: write_json(folder.manifest, story))
                raise


def off_device(pipeline: Pipeline) -> Pipeline:
    """UNet and VAE in the host's memory: training has copies of its own, and a chip has no room for both."""
    if jax.default_backend() == "cpu":
        return pipeline
    return _with_params(pipeline, jax.device_get)


def on_device(pipeline: Pipeline) -> Pipeline:
    return _with_params(pipeline, jax.device_put)


def _with_params(pipeline: Pipeline, put) -> Pipeline:
    moved = {name: getattr(pipeline, name) for name in ("unet", "vae")}
    moved = {name: dataclasses.replace(model, params=put(model.params)) for name, model in moved.items()}
    return dataclasses.replace(pipeline, **moved)


def in_full(pipeline: Pipeline, names) -> Pipeline:
    """The pipeline with the components of these names in float32 (`_in_full`)."""
    return dataclasses.replace(pipeline, **{name: _in_full(pipeline, name) for name in names})


def with_drift(pipeline, drift) -> Pipeline:
    """The pipeline with the drift {component: {path: array}} added to its parameters, in float32."""
    models = {}
    for name, moves in drift.items():
        model = _in_full(pipeline, name)
        moved = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in flatten(model.params).items() if path in moves}
        moved = {path: leaf + moves[path] for path, leaf in moved.items()}
        models[name] = dataclasses.replace(model, params=unflatten(flatten(model.params) | moved))
    return dataclasses.replace(pipeline, **models)


def _export(run, pipeline, drift, folder) -> None:
    """Writes what `with_drift` gives, tensor by tensor: beside pipeline and drift it is never in memory as a whole."""
    text = card.text(run, folder.read_metrics())
    try:
        save_pipeline(pipeline, folder.pipeline, overwrite=True, card=text, drift=drift)
    except KeyboardInterrupt as stopped:  # nothing is lost: the newest checkpoint is of the last step
        raise loop.Interrupted(getattr(stopped, "signum", signal.SIGINT), run.erase.steps) from stopped
    folder.drop_previous()
