"""What the user gives `aegis attack`: folders of pictures, with what each was made from."""

import re
from pathlib import Path

import numpy as np

from aegis_jax.attacks import find
from aegis_jax.attacks.given import Given, Pictures
from aegis_jax.diffusion.sample import latent_shape, pixels_per_latent
from aegis_jax.errors import AegisError
from aegis_jax.io.hub import expand
from aegis_jax.io.pictures import picture_files, read_pictures
from aegis_jax.run.judging import in_words
from aegis_jax.run.prompts import INDEX, Prompt, check_index, seed_of
from aegis_jax.run.prompts import read as read_prompts


def of_folder(job, folder: Path, file, neutral, without) -> Given:
    """What the user has for a `run.attack.Job`: pictures, and for attacks that say it what each was made from.

    That is said by `file`, a prompt for each picture in the order of their names, or by the index that `aegis sample`
    wrote beside them; otherwise every prompt is the concept.
    """
    images, said = _pictures(job, folder, indexed=find(job.method).says)
    if file is not None:
        prompts = read_prompts(expand(file)).prompts
        if len(prompts) != len(images):
            raise AegisError(f"{file} has {len(prompts)} prompts and {folder} {len(images)} pictures: wanted as many")
    else:
        prompts = [
            Prompt(job.concept) if row is None else Prompt(row["prompt"], seed_of(row["seed"], "seed", folder / INDEX))
            for row in said
        ]
    texts = made_from = [prompt.text for prompt in prompts]
    if neutral is not None and find(job.method).says:
        said = re.compile(re.escape(job.concept), re.IGNORECASE)
        texts = [said.sub(lambda _: neutral, text) for text in texts]
        if texts == made_from:
            raise AegisError(f"--neutral {neutral}: no prompt says {job.concept!r}, so there is nothing to put it for")
    seeds = [k if prompt.seed is None else prompt.seed for k, prompt in enumerate(prompts)]
    if job.asked is not None:  # a judge that does not know the concept where it is finds nothing afterwards either
        print(f"the judge sees {job.asked.label!r} in {in_words(job.asked.counted(images))} of the pictures given")
    look = {"judge": job.asked, "steps": job.steps, "guidance": job.guidance}
    if without is not None:
        others, rows = _pictures(job, expand(without))
        look["without"] = Pictures(others, ["" if row is None else row["prompt"] for row in rows])
        if job.asked is not None:
            print(f"and in {in_words(job.asked.counted(others))} of those without it")
    return Given(images, texts, seeds, job.original, made_from=made_from, **look)


def _pictures(job, folder: Path, indexed: bool = True) -> tuple[np.ndarray, list[dict | None]]:
    """The pictures of a folder at the model's size, and what `aegis sample` said of each, if it made them."""
    height, width, _ = latent_shape(job.pipeline)
    factor = pixels_per_latent(job.pipeline)
    index = check_index(folder) if indexed and (folder / INDEX).exists() else {}
    images = read_pictures(folder, (width * factor, height * factor))
    return images, [index.get(path.name) for path in picture_files(folder)]
