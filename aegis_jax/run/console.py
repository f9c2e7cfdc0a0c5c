"""What `aegis erase`, `sample` and `attack` do between parsing and printing."""

import contextlib
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from aegis_jax.attacks import attack as attack_concept
from aegis_jax.diffusion.sample import latent_shape, plan
from aegis_jax.diffusion.sample import sample as sample_images
from aegis_jax.errors import AegisError
from aegis_jax.io.hub import expand
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.models.unet_config import native_size
from aegis_jax.run import loop
from aegis_jax.run.erase import erase as erase_concepts
from aegis_jax.run.progress import Progress


def erase(model, concepts, *, config, overrides, out, resume, overwrite) -> None:
    """`aegis erase`: a run with progress, then the table and where everything is."""
    if out is None and (resume or overwrite):
        raise AegisError("--resume and --overwrite need --out: the run folder")
    out = Path(out) if out is not None else free_folder(concepts or [config or "run"])
    progress = Progress()
    try:
        result = erase_concepts(
            model, concepts, config=config, overrides=overrides,
            out=out, resume=resume, overwrite=overwrite, progress=progress,
            measure=partial(_world_table, progress),
        )  # fmt: skip
    except loop.Interrupted as stopped:
        progress.say(f"saved; go on with: aegis erase --resume --out {out}")
        raise stopped
    finally:
        progress.end()
    if result.measured:
        print(result.measured)
    print(f"run      {result.folder}")
    if (result.folder / "before_after.png").exists():
        print(f"picture  {result.folder / 'before_after.png'}")
    print(f"model    {result.folder / 'pipeline'}")


def _world_table(progress, run, before, after) -> str | None:
    """The judge's rates before and after, where there is a judge: for values of the world."""
    if not run.is_world:
        return None
    from aegis_jax.evaluation import world as evaluation

    progress.say("measuring before and after")
    return "\n".join(
        evaluation.world_table(before, after, concept)
        if evaluation.find(concept)
        else f"{concept!r} is not one value of the world: its judge cannot measure it"
        for concept in run.concepts
    )


@contextlib.contextmanager
def _made(folder: Path):
    """Makes a folder before what is to go into it is computed; on failure what is new and empty goes again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise AegisError(f"{folder} cannot be written to: choose another --out")
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()
        raise


def free_folder(names) -> Path:
    """runs/NAME, or runs/NAME-2 and so on where that exists."""
    first = Path("runs") / (_slug(" ".join(Path(name).stem for name in names)) or "run")
    folder, count = first, 1
    while folder.exists():
        count += 1
        folder = first.with_name(f"{first.name}-{count}")
    return folder


def sample(model, prompts, out, *, images, overwrite, revision=None, variant=None, **settings) -> None:
    """`aegis sample`: PNGs named by number and prompt."""
    if images < 1:
        raise AegisError(f"--images {images}: wanted 1 or more")
    wanted = [prompt for prompt in prompts for _ in range(images)]
    out = expand(out)
    files = [out / f"{k:03d}-{_slug(prompt) or 'empty'}.png" for k, prompt in enumerate(wanted)]
    taken = [file for file in files if file.exists()]
    if taken and not overwrite:
        raise AegisError(f"{taken[0]} exists: choose another --out or allow --overwrite")
    pipeline = load_pipeline(model, revision=revision, variant=variant)
    plan(pipeline, settings["steps"], settings["guidance"])
    progress = Progress()
    with _made(out):
        progress.say(f"sampling {len(wanted)} images ...")
        pictures = sample_images(pipeline, wanted, **settings)
    for file, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture).save(file)
    print(f"wrote {len(files)} images to {out}")


def attack(model, concept, *, images, out, revision=None, variant=None, **settings) -> None:
    """`aegis attack`: soft prompts; judged for the world, otherwise for the user's eyes."""
    from aegis_jax.evaluation import world as evaluation

    pipeline = load_pipeline(model, revision=revision, variant=variant)
    progress = Progress()

    def show(done, steps, loss):
        progress.update(done * settings["steps"] // steps, loss)  # steps: of all groups of restarts

    if images is None:
        value = evaluation.find(concept)
        if not value or pipeline.unet.config != load_pipeline("world").unet.config:
            raise AegisError("no --images given: an attack needs pictures of the concept")
        if out is not None:
            raise AegisError("--out goes with --images: on the world the judge counts, and no image is written")
        progress.start(0, settings["steps"])
        rates = evaluation.attacked(pipeline, value, text=concept, progress=show, **settings)
        each = ", ".join(f"{rate:.0%}" for rate in rates["attacked_each"])
        print(f"the judge sees {value.value.name!r} in {rates['attacked']:.1%} of the images under")
        print(f"soft prompts, {rates['attacked_best']:.1%} under the best restart (each: {each})")
        return
    out = expand(out or "attack")
    if out.exists():
        raise AegisError(f"{out} exists: choose another --out")
    latent_shape(pipeline)  # what cannot be sampled afterwards is refused before the attack
    plan(pipeline, evaluation.STEPS, evaluation.GUIDANCE)
    pictures = _pictures(Path(images), pipeline)
    progress.start(0, settings["steps"])
    with _made(out):
        found = attack_concept(pipeline, concept, images=pictures, progress=show, **settings)
        for restart, emb in enumerate(found.text_emb):
            shown = evaluation.sample_from_embedding(pipeline, np.stack([emb] * 4), seed=restart)
            for k, picture in enumerate(shown):
                Image.fromarray(picture).save(out / f"restart-{restart}-{k}.png")
            first, last = found.losses[0, restart], found.losses[-1, restart]
            print(f"restart {restart}: denoising loss {first:.4f} -> {last:.4f}")
    print(f"wrote {4 * len(found.text_emb)} images to {out}")


def _pictures(folder: Path, pipeline) -> np.ndarray:
    """The PNG and JPEG files of a folder as uint8 (m, H, W, 3), cut and scaled to the model's size."""
    files = sorted(f for f in folder.glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise AegisError(f"{folder} holds no .png or .jpg pictures")
    height, width = native_size(pipeline.unet.config) or (64, 64)
    shrink = 2 ** (len(pipeline.vae.config.get("block_out_channels", [0] * 4)) - 1)
    size = (width * shrink, height * shrink)
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pictures.append(np.asarray(ImageOps.fit(picture.convert("RGB"), size)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, all of them
            raise AegisError(f"{file} cannot be read as a picture: {error}") from error
    return np.stack(pictures)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
