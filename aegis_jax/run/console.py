"""What `aegis erase`, `sample` and `attack` do between parsing and printing."""

import contextlib
import os
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from aegis_jax.attacks import SoftPromptConfig
from aegis_jax.attacks import attack as attack_concept
from aegis_jax.diffusion.sample import latent_shape, plan
from aegis_jax.diffusion.sample import sample as sample_images
from aegis_jax.errors import AegisError
from aegis_jax.io.hub import expand
from aegis_jax.io.pictures import read_pictures
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.run import loop
from aegis_jax.run.erase import erase as erase_concepts
from aegis_jax.run.progress import Progress

# How an attack's pictures are made, but of the world; and how many of each restart.
GUIDANCE, STEPS, PICTURES = 7.5, 50, 4


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


def attack(
    model, concept, *, images, out, revision=None, variant=None, original=None, guidance=None, image_steps=None, **settings
) -> None:
    """`aegis attack`: soft prompts; judged for the world, otherwise for the user's eyes."""
    from aegis_jax.evaluation import attacked, world
    from aegis_jax.world import quality

    pipeline, base = load_pipeline(model, revision=revision, variant=variant), load_pipeline("world")
    is_world = pipeline.unet.config == base.unet.config
    original = load_pipeline(original) if original is not None else base if is_world else None
    progress = Progress()

    def show(done, steps, loss):
        progress.update(done * settings["steps"] // steps, loss)  # steps: of all restarts

    if images is None:
        value = world.find(concept)
        if not value or not is_world:
            raise AegisError("no --images given: an attack needs pictures of the concept")
        if out is not None:
            raise AegisError("--out goes with --images: on the world the judge counts, and no image is written")
        config = SoftPromptConfig(**settings)
        progress.start(0, settings["steps"])
        found = attacked.attack_family(
            original, pipeline, value, {"it": config}, seed=config.seed, text=concept, progress=show
        )
        rates = found["members"]["it"]
        low, high = rates["interval"]
        each = ", ".join(f"{rate:.0%}" for rate in rates["each"])
        print(f"the judge sees {value.value.name!r} in {rates['mean']:.1%} of the images under soft prompts")
        print(f"({low:.1%} to {high:.1%} at 95 %), in {rates['pick']:.1%} under the attacker's own pick,")
        print(f"in {rates['best']:.1%} under the best restart (each: {each})")
        return
    out = expand(out or "attack")
    if out.exists():
        raise AegisError(f"{out} exists: choose another --out")
    height, width, channels = latent_shape(pipeline)  # what cannot be sampled afterwards is refused before the attack
    guidance = (quality.GUIDANCE if is_world else GUIDANCE) if guidance is None else guidance
    image_steps = (quality.STEPS if is_world else STEPS) if image_steps is None else image_steps
    plan(pipeline, image_steps, guidance)
    shrink = 2 ** (len(pipeline.vae.config.get("block_out_channels", [0] * 4)) - 1)
    shown = read_pictures(expand(images), (width * shrink, height * shrink))
    progress.start(0, settings["steps"])
    with _made(out):
        found = attack_concept(pipeline, concept, images=shown, original=original, progress=show, **settings)
        for restart in range(len(found.soft_tokens)):
            cond = jax.tree.map(lambda x, r=restart: np.stack([x[r]] * PICTURES), found.conditioning)
            start = np.random.default_rng(restart).standard_normal((PICTURES, height, width, channels), np.float32)
            pictures = attacked.sample_conditioning(pipeline, cond, start, steps=image_steps, guidance=guidance)
            for k, picture in enumerate(pictures):
                Image.fromarray(picture).save(out / f"restart-{restart}-{k}.png")
            first, last = found.losses[0, restart], found.losses[-1, restart]
            own = " (the attacker's pick)" if restart == found.pick else ""
            print(f"restart {restart}: {settings.get('goal', 'denoising')} loss {first:.4f} -> {last:.4f}{own}")
    print(f"wrote {PICTURES * len(found.soft_tokens)} images to {out}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
