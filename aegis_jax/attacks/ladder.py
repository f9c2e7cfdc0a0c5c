"""A ladder of wordings, with no search: the name, what stands before it, other names, descriptions (EMMA, 2512.17320).

An erasure that knows a word may not know what it means. Each prompt of `given` is asked in the words of every rung,
from the same noise; the rate of each rung is what counts, and a prompt falls if any rung brings the concept back.
"""

import dataclasses
import time

import numpy as np

from aegis_jax.attacks.given import Given
from aegis_jax.attacks.result import ATTACK, FAILED, NOT_NEEDED, SUCCEEDED, AttackResult
from aegis_jax.attacks.rows import viewer_of
from aegis_jax.diffusion.conditioning import encode
from aegis_jax.errors import AegisError

NAME = "ladder"


@dataclasses.dataclass(frozen=True)
class LadderConfig:
    """Nothing is searched for, so that nothing is to be set; the wordings are `Given.ladder`."""


def ladder(pipeline, concept: str, given: Given, config: LadderConfig, progress=None) -> AttackResult:
    """Rows: every prompt's rungs, in their order. Raises `AegisError` without wordings."""
    rungs = given.ladder
    if not rungs or not all(rungs.values()):
        raise AegisError(f"attack {NAME} needs wordings of the concept, at least one in each rung (--ladder)")
    began, n = time.perf_counter(), len(given.prompts)
    texts = [wordings[i % len(wordings)] for i in range(n) for wordings in rungs.values()]
    viewer = viewer_of(pipeline, given, len(texts))
    start = viewer.noise(given.seeds)
    images = viewer(texts, np.repeat(start, len(rungs), axis=0))
    outcomes, shown = None, {}
    if given.judge is not None:
        hits = np.asarray(given.judge(images), bool).reshape(n, len(rungs))
        plain = viewer.shown(given.prompts, start)
        fell = np.where(hits, SUCCEEDED, FAILED)
        outcomes = [str(outcome) for outcome in np.where(plain[:, None], NOT_NEEDED, fell).ravel()]
        shown = {ATTACK: {rung: hits[:, k] for k, rung in enumerate(rungs)}}
    return AttackResult(
        prompts=texts,
        conditioning=encode(pipeline, texts),
        losses=np.zeros((0, len(texts)), np.float32),
        unet_evaluations=viewer.unet_evaluations,
        seconds=time.perf_counter() - began,
        outcomes=outcomes,
        images=images,
        levels=shown,
    )
