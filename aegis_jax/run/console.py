"""What `aegis erase` and `sample` do between parsing and printing; `attack` is in attack.py."""

import contextlib
import itertools
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from aegis_jax.diffusion.sample import latent_shape, pixels_per_latent, plan
from aegis_jax.diffusion.sample import sample as sample_images
from aegis_jax.errors import AegisError
from aegis_jax.io.hub import commit, expand, place
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.parallel import processes
from aegis_jax.run import claim, loop
from aegis_jax.run.asked import settings as erase_settings
from aegis_jax.run.claim import one_at_a_time
from aegis_jax.run.erase import erase as erase_concepts
from aegis_jax.run.folder import RunFolder
from aegis_jax.run.progress import Progress
from aegis_jax.run.prompts import COLUMNS, Prompt, check_index, unused, write_index
from aegis_jax.run.prompts import read as read_prompts
from aegis_jax.run.slug import numbered, slug

IMAGES_AT_ONCE = 256  # that `aegis sample` holds before it writes them


def erase(model, concepts, *, config, overrides, out, resume, auto_resume, overwrite) -> None:
    """`aegis erase`: a run with progress, then the table and where everything is."""
    if out is None and (resume or auto_resume or overwrite):
        raise AegisError("--resume, --auto-resume and --overwrite need --out: the run folder")
    processes.start()
    if auto_resume:
        processes.first(lambda: claim.take_over(RunFolder(out).path, say=Progress().say))
        resume = processes.first(RunFolder(out).is_run)
    if out is None and processes.several():
        raise AegisError("several processes need --out: one run folder that all their hosts share")
    if out is None:  # what is erased may be said by the config alone
        named = free_folder(erase_settings(model, concepts, config, overrides).concepts)
    else:
        named = contextlib.nullcontext(Path(out))
    progress = Progress()
    with named as folder, processes.ending(loop.NonFiniteError):
        try:
            result = erase_concepts(
                model, concepts, config=config, overrides=overrides,
                out=folder, resume=resume, overwrite=overwrite, progress=progress,
                measure=partial(_world_table, progress),
            )  # fmt: skip
        except loop.Interrupted as stopped:
            if processes.is_first():
                progress.say(f"saved; go on with: aegis erase --resume --out {folder}")
            raise stopped
        finally:
            progress.end()
    if not processes.is_first():
        return
    if result.measured:
        print(result.measured)
    print(f"method   {result.run.erase.method}")
    print(f"run      {result.folder}")
    if (result.folder / "before_after.png").exists():
        print(f"picture  {result.folder / 'before_after.png'}")
    print(f"model    {result.folder / 'pipeline'}")


def _world_table(progress, run, before, after) -> str | None:
    """The judge's rates before and after, where there is a judge: for values of the world."""
    if run.world is None:
        return None
    from aegis_jax.evaluation import world as evaluation

    progress.say("measuring before and after")
    return f"method: {run.erase.method}\n{evaluation.world_table(before, after, run.concepts, within=run.world.name)}"


@contextlib.contextmanager
def made(folder: Path, *, is_new: bool = False):
    """Makes a folder before what is to go into it is computed; on failure what is new and empty goes again.

    is_new: one that is there, be it since a moment ago, is refused.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=not is_new)
    except FileExistsError:
        raise AegisError(f"{folder} exists: choose another --out") from None
    if not os.access(folder, os.W_OK):
        raise AegisError(f"{folder} cannot be written to: choose another --out")
    with _gone_if_empty(*new):
        yield


@contextlib.contextmanager
def free_folder(names):
    """A new folder runs/NAME, or runs/NAME-2 and so on where that is taken; on failure it goes again if it is empty."""
    runs, name = Path("runs"), slug(" ".join(names)) or "run"
    with made(runs):
        for count in itertools.count(1):
            folder = runs / (name if count == 1 else f"{name}-{count}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
        with _gone_if_empty(folder):
            yield folder


@contextlib.contextmanager
def _gone_if_empty(*folders: Path):
    """Removes these, the innermost first, if something goes wrong before anything came into them."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in folders:
                folder.rmdir()
        raise


def sample(
    model, given, out, *, file, images, seed, overwrite, height, width, revision=None, variant=None, **settings
) -> None:
    """`aegis sample`: PNGs named by number and prompt, and prompts.csv, which says of each what it was made from.

    Image k of a prompt starts from the noise of its seed + k alone, so neither the other prompts nor the batch matter.
    """
    for name, count in (("images", images), ("batch", settings["batch"])):
        if count is not None and count < 1:
            raise AegisError(f"--{name} {count}: wanted 1 or more")
    out, progress = expand(out), Progress()
    read = read_prompts(expand(file)) if file else None
    found, said = (read.prompts, read.said) if read else (list(map(Prompt, given)), {})
    texts = [prompt.text for prompt in found for _ in range(images)]
    seeds = [(seed if prompt.seed is None else prompt.seed) + k for prompt in found for k in range(images)]
    files = [out / f"{numbered(k, len(texts))}-{slug(text) or 'empty'}.png" for k, text in enumerate(texts)]
    taken = [path for path in files if path.exists()]
    if taken and not overwrite:
        raise AegisError(f"{taken[0]} exists: choose another --out or allow --overwrite")
    check_index(out)
    pipeline = load_pipeline(model, revision=revision, variant=variant)
    plan(pipeline, settings["steps"], settings["guidance"])
    shape = latent_shape(pipeline, height, width)
    height, width = (latents * pixels_per_latent(pipeline) for latents in shape[:2])
    pipeline.tokenizer.ids(texts)  # says at once, and once, which are too long
    revision = commit(model, pipeline.source.folder.path)
    shared = {"height": height, "width": width, "model": place(model), "revision": revision, "variant": variant or ""}
    shared |= settings
    for note in unused(file, said, shared):
        progress.say(f"aegis: note: {note}")
    with made(out):
        for rows in np.array_split(np.arange(len(texts)), -(-len(texts) // IMAGES_AT_ONCE)):
            progress.say(f"sampling images {rows[0] + 1} to {rows[-1] + 1} of {len(texts)} ...")
            some = [texts[k] for k in rows], [seeds[k] for k in rows]
            pictures = sample_images(pipeline, some[0], seed=some[1], height=height, width=width, **settings)
            index = [{"file": files[k].name, "prompt": texts[k], "seed": seeds[k], **shared} for k in rows]
            _write(out, pictures, index, overwrite)
    print(f"wrote {len(files)} images to {out}")


def _write(out: Path, pictures: np.ndarray, rows: list[dict], overwrite: bool) -> None:
    """PNGs and their rows of the index, together: another process may write into the same folder, even the same names.

    Without `overwrite` none is written over one that has come there since it was looked for.
    """
    with one_at_a_time(out):
        index = check_index(out)
        try:
            for picture, row in zip(pictures, rows, strict=True):
                with open(out / row["file"], "wb" if overwrite else "xb") as file:
                    Image.fromarray(picture).save(file, "PNG")
                index[row["file"]] = {name: row[name] for name in COLUMNS}
        finally:
            write_index(out, index)
