"""What the user brings to examine a model that is no embedded world: read, and refused before anything starts."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aegis_jax.diffusion.sample import plan
from aegis_jax.errors import AegisError
from aegis_jax.evaluation.metrics import neighbours, similarity
from aegis_jax.io.hub import expand
from aegis_jax.io.pictures import picture_files
from aegis_jax.judges.judge import Judge, as_numbers
from aegis_jax.report.chosen import names
from aegis_jax.run.judging import Question, question
from aegis_jax.run.prompts import PromptSet, read

GUIDANCE, STEPS = 7.5, 50  # of images, as `aegis attack` has them
OPTIONS = ("judge", "label", "prompts", "guidance", "image_steps", "retain", "real", "clip", "beside")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the user brings.

    Attributes:
      question: the judge and the label that counts.
      guidance, steps: of images; a row of `prompts` may bring its own guidance.
      retain: neutral prompts, or None; real: the folder of real pictures of such, or None.
      clip: for the CLIP score and as one ruler of the Frechet distance, or None.
      near: words, each of them a label of the judge.
      beside: the word that goes with the concept (CARE), or "".
    """

    question: Question
    prompts: PromptSet
    guidance: float = GUIDANCE
    steps: int = STEPS
    retain: PromptSet | None = None
    real: Path | None = None
    clip: similarity.Embedder | None = None
    near: tuple[str, ...] = ()
    beside: str = ""


def asked(concept: str, near: str, options: dict) -> Asked:
    """Of the command line's `options` (None: not given). Raises `AegisError` for what cannot be read."""
    for name in ("judge", "prompts"):
        if options[name] is None:
            raise AegisError(f"--base is not an embedded world: give --{name} (docs/evaluate.md)")
    given = {name: options[name] for name in ("retain", "real") if options[name] is not None}
    if "real" in given:
        given["real"] = expand(given["real"])
    if "retain" in given:
        given["retain"] = read(expand(given["retain"]))
    for flag, name, usual in (("guidance", "guidance", GUIDANCE), ("image_steps", "steps", STEPS)):
        given[name] = usual if options[flag] is None else options[flag]
    if options["clip"] is not None:
        given["clip"] = similarity.embedder(options["clip"])
    about = question(options["judge"], concept if options["label"] is None else options["label"])
    return Asked(
        question=about, prompts=read(expand(options["prompts"])), near=_labels_once(about.judge, names(near)),
        beside=options["beside"] or "", **given,
    )  # fmt: skip


def _labels_once(judge: Judge, words: list[str]) -> tuple[str, ...]:
    """The words, of those that mean one label the first. Raises `AegisError` for one that means none."""
    first: dict[str, str] = {}
    for word in words:
        first.setdefault(judge.find(word), word)
    return tuple(first.values())


def rulers(given: Asked) -> dict[str, Callable]:
    """{name: features} to measure a Frechet distance by: the judge's, the CLIP's, those that there are.

    Each raises `AegisError` where it does not give a row of numbers for every image.
    """
    judge = given.question.judge
    found = {} if judge.features is None else {"judge": (judge.features, f"judge {judge.name}")}
    found |= {} if given.clip is None else {"clip": (given.clip.features, "--clip")}
    return {name: functools.partial(_features, of, whose) for name, (of, whose) in found.items()}


def _features(of: Callable, whose: str, images: np.ndarray) -> np.ndarray:
    found = as_numbers(of(images), f"{whose} gave as features")
    if found.ndim != 2 or len(found) != len(images) or not np.isfinite(found).all():
        raise AegisError(
            f"{whose} gave features {found.shape} for {len(images)} images, wanted finite numbers "
            f"({len(images)}, width)"
        )
    return found


def check(base, given: Asked, size: tuple[int, int]) -> None:
    """Refuses what does not fit the base, whose pictures have `size` (height, width), or each other."""
    for guidance in {given.guidance, *(prompt.guidance for prompt in given.prompts.prompts)} - {None}:
        plan(base, given.steps, guidance)
    judge = given.question.judge
    blank = np.zeros((2, *size, 3), np.uint8)
    given.question(blank)  # a judge of another size says so now
    if given.retain is None and given.real is not None:
        raise AegisError("--real goes with --retain: pictures of what the neutral prompts ask for")
    if given.retain is not None and len(given.retain.prompts) < 2:
        raise AegisError(f"{given.retain.path} has one prompt: a Frechet distance needs two or more")
    if given.retain is not None and not rulers(given):
        raise AegisError(f"--retain: the judge {judge.name} has no features to measure by: give --clip")
    for features in rulers(given).values() if given.retain is not None else ():
        features(blank)
    if given.real is not None and len(picture_files(given.real)) < 2:
        raise AegisError(f"--real {given.real} holds one picture: a Frechet distance needs two or more")
    if given.beside and given.clip is None:
        raise AegisError("--beside goes with --clip, which says what an image is nearest to")
    for word in given.near:
        if judge.find(word) == given.question.label:
            raise AegisError(f"--near {word!r} is what the judge counts as the concept")
        if word == neighbours.TOGETHER:
            raise AegisError(f"--near {word!r} stands for all near words together: leave it out")
