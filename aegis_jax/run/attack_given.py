"""What the user gives `aegis attack`: folders of pictures, with what each was made from."""

import warnings
from pathlib import Path

import numpy as np

from aegis_jax.attacks import find
from aegis_jax.attacks.given import Given, Pictures
from aegis_jax.diffusion.sample import latent_shape, pixels_per_latent
from aegis_jax.erasure.texts import naming
from aegis_jax.errors import AegisError
from aegis_jax.io.hub import expand
from aegis_jax.io.pictures import picture_files, read_pictures
from aegis_jax.run import table
from aegis_jax.run.judging import in_words
from aegis_jax.run.prompts import INDEX, Prompt, check_index, seed_of, unused
from aegis_jax.run.prompts import read as read_prompts

SETTINGS = ("guidance", "steps", "negative_prompt")  # of pictures, that an attack has one of for all


def of_folder(job, folder: Path, neutral, prompts=None, ladder=None, without=None) -> Given:
    """What the user has for a `run.attack.Job`: pictures, and for attacks that say it what each was made from.

    That is said by the file `prompts`, a prompt for each picture in the order of their names, or by the index that
    `aegis sample` wrote beside them; otherwise every prompt is the concept.
    """
    instead = "say the prompts by --prompts FILE, or move it out of the folder"
    images, said = _pictures(job, folder, instead, indexed=find(job.method).says and prompts is None)
    if prompts is not None:
        file, found = prompts, read_prompts(expand(prompts))
        prompts, columns = found.prompts, found.said
        if len(prompts) != len(images):
            raise AegisError(f"{file} has {len(prompts)} prompts and {folder} {len(images)} pictures: wanted as many")
    else:
        prompts = [
            Prompt(job.concept) if row is None else Prompt(row["prompt"], seed_of(row["seed"], "seed", folder / INDEX))
            for row in said
        ]
        file, rows = folder / INDEX, [row for row in said if row is not None]
        columns = {name: {row[name] for row in rows} for name in SETTINGS if rows}
    own = dict(zip(SETTINGS, (job.guidance, job.steps, "")))
    for note in unused(Path(file), {name: columns[name] - {""} for name in own if name in columns}, own):
        warnings.warn(note, stacklevel=2)
    texts = made_from = [prompt.text for prompt in prompts]
    rungs = None if ladder is None else _ladder(expand(ladder))
    if neutral is not None and find(job.method).says:
        named = naming(job.concept)
        put = lambda texts: [named.sub(lambda _: neutral, text) for text in texts if named.search(text)]  # noqa: E731
        texts = put(texts)
        # Wordings that do not name the concept would be asked as they are, and control nothing.
        rungs = rungs and {rung: said for rung, wordings in rungs.items() if (said := put(wordings))}
        if len(texts) < len(made_from) or rungs == {}:
            raise AegisError(f"--neutral {neutral}: a prompt does not say {job.concept!r}, and would control nothing")
    seeds = [k if prompt.seed is None else prompt.seed for k, prompt in enumerate(prompts)]
    if job.asked is not None:  # a judge that does not know the concept where it is finds nothing afterwards either
        print(f"the judge sees {job.asked.label!r} in {in_words(job.asked.counted(images))} of the pictures given")
    look = {"judge": job.asked, "steps": job.steps, "guidance": job.guidance, "ladder": rungs}
    if job.asked is not None:
        look["probability"] = job.asked.probability
    if without is not None:
        others, rows = _pictures(job, expand(without), "move it out of the folder")
        look["without"] = Pictures(others, ["" if row is None else row["prompt"] for row in rows])
        if job.asked is not None:
            print(f"and in {in_words(job.asked.counted(others))} of those without it")
    return Given(images, texts, seeds, job.original, made_from=made_from, **look)


def _pictures(job, folder: Path, instead: str, indexed: bool = True) -> tuple[np.ndarray, list[dict | None]]:
    """The pictures of a folder at the model's size, and what `aegis sample` said of each, if it made them.

    instead: what to do about a prompts.csv that says something else.
    """
    height, width, _ = latent_shape(job.pipeline)
    factor = pixels_per_latent(job.pipeline)
    index = check_index(folder, instead) if indexed else {}
    images = read_pictures(folder, (width * factor, height * factor))
    return images, [index.get(path.name) for path in picture_files(folder)]


def _ladder(path: Path) -> dict[str, list[str]]:
    """{rung: its wordings} of a .csv with the columns rung and prompt, both in the order of the file."""
    try:
        columns, rows, problems = table.read(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        columns, rows, problems = [], [], []
    if not {"rung", "prompt"} <= set(columns):
        raise AegisError(f"{path}: wanted a .csv in UTF-8 with the columns rung and prompt")
    problems += [(line, "no prompt") for line, row in rows if row["prompt"] is None or row["rung"] is None]
    table.refuse(path, problems)
    found: dict[str, list[str]] = {}
    for _, row in rows:
        found.setdefault(row["rung"].strip(), []).append(row["prompt"].strip())
    if not found:
        raise AegisError(f"{path} has no wordings")
    return found
