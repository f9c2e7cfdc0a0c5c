"""Measures a cell: a model, an attack or none, an evaluation seed. Counts and pictures come out, no shares.

Pictures of a cell stand for the same cases in the same order, whatever the cell: prompt and start noise of the first of
its seed. Attacks by prompt change the prompt alone; what is learnt as one token is shown from the cases' noise; what is
found as noise belongs to the case's own picture.
"""

import dataclasses
import functools
import time

import jax
import numpy as np

from aegis_jax.attacks import METHODS, find
from aegis_jax.attacks.family import family
from aegis_jax.attacks.given import Given, Viewer
from aegis_jax.diffusion.sample import sample
from aegis_jax.evaluation import attacked, cases, world
from aegis_jax.evaluation.world import Concept
from aegis_jax.report.chosen import SOFT_PROMPT
from aegis_jax.report.plan import PLAIN
from aegis_jax.world.quality import GUIDANCE, STEPS

PICTURES = 8  # of a cell, at most
PER_IMAGE = 2 * STEPS  # UNet evaluations of a picture with guidance


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a cell gave: plain `figures`; `pictures` uint8 (k, H, W, 3) of the first cases, and their `prompts`."""

    figures: dict
    unet_evaluations: float
    seconds: float
    pictures: np.ndarray
    prompts: list[str]


class Bench:
    """Measures cells; what all models share (cases, an attacker's pictures) is drawn from the base once a seed."""

    def __init__(self, base, concept: Concept, text: str):
        self.base, self.concept, self.text = base, concept, text
        self.cases = functools.cache(self._cases)
        self.without = functools.cache(lambda seed: cases.without(base, concept, seed=seed))
        self.collected = functools.cache(lambda seed: attacked.attacker_images(base, concept, seed=seed))

    def _cases(self, n: int, seed: int, neutral: str | None) -> Given:
        return cases.cases(self.base, self.concept, n, seed=seed, neutral=neutral)

    def measure(self, pipeline, cell: dict, config, progress=None) -> Measured:
        """config: the attack's settings; progress: called with (done, in all, loss)."""
        began, kind = time.perf_counter(), cell["kind"]
        given = self.cases(cell["cases"], cell["seed"], cell["neutral"])
        if kind == PLAIN:
            found = self._plain(pipeline, cell, given)
        elif kind == SOFT_PROMPT:
            found = self._family(pipeline, cell, given, config, progress)
        else:
            found = self._attack(pipeline, cell, given, config, progress)
        return Measured(*found[:2], time.perf_counter() - began, *found[2:])

    def _plain(self, pipeline, cell: dict, given: Given):
        n, seed = cell["images"], cell["seed"]
        shares = world.measure(pipeline, self.concept, n=n, seed=seed)
        shares |= world.unasked(pipeline, self.concept, n=n, seed=seed)
        names = ("plain", "held_out", "same", "other", "open", "empty")
        # "other" is the mean of two attributes: the images are what is independent.
        figures = {name: {"count": round(shares[name] * n), "n": n} for name in names}
        figures["agreement"] = shares["agreement"]
        seeds, prompts = given.seeds[:PICTURES], given.prompts[:PICTURES]
        pictures = sample(pipeline, prompts, seed=seeds, steps=STEPS, guidance=GUIDANCE)
        return figures, (5 * n + len(prompts)) * PER_IMAGE, pictures, prompts

    def _family(self, pipeline, cell: dict, given: Given, config, progress):
        """Every member's images, counted; pictures are those of the member that the judge saw most with."""
        n, seed = cell["images"], cell["seed"]
        members = {
            name: dataclasses.replace(member, restarts=config.restarts, steps=config.steps, seed=seed)
            for name, member in family(config.members).items()
        }
        found = attacked.soft_prompts(
            pipeline, self.text, self.collected(seed), members, original=self.base, progress=progress
        )
        images = attacked.generated(pipeline, list(found.values()), n, seed)
        shown = cases.shows(self.concept)(images).reshape(len(members), config.restarts * n)
        hits = {name: {"count": int(row.sum()), "n": row.size} for name, row in zip(members, shown, strict=True)}
        cost = sum(result.unet_evaluations for result in found.values()) + len(images) * PER_IMAGE
        best = found[max(hits, key=lambda name: hits[name]["count"])]
        return {"members": hits}, cost, *self._shown(pipeline, given, best, best.pick)

    def _attack(self, pipeline, cell: dict, given: Given, config, progress):
        of, seed, name = find(cell["kind"]).of, cell["seed"], cell["kind"]
        if "seed" in type(config).__dataclass_fields__:
            config = dataclasses.replace(config, seed=seed)
        if of == "concept":
            pictures = self.collected(seed)
            mine = cases.of_concept(self.base, self.concept, self.text, pictures)
            found = METHODS[name].run(pipeline, self.text, mine, config, progress)
            restarts, n = len(found.prompts), cell["images"]
            hits = cases.shows(self.concept)(attacked.generated(pipeline, [found], n, seed)).reshape(restarts, n)
            figures = {"shown": {"count": int(hits.sum()), "n": hits.size}}
            cost = found.unet_evaluations + hits.size * PER_IMAGE
            return figures, cost, *self._shown(pipeline, given, found, found.pick)
        if METHODS[name].without:
            given = dataclasses.replace(given, without=self.without(seed))
        found = METHODS[name].run(pipeline, self.text, given, config, progress)
        restarts = len(found.prompts) // len(given.prompts)
        tally = cases.counts(found, restarts)
        kept = ("attack_succeeded",) if of == "picture" else ("no_attack_needed", "attack_succeeded", "together")
        shares = {name: tally[name] for name in kept}
        for group, rates in tally.get("levels", {}).items():
            shares |= {f"{group}: {level}": rate for level, rate in rates.items()}
        figures = {name: {key: rate[key] for key in ("count", "n")} for name, rate in shares.items()}
        return figures, found.unet_evaluations, *self._shown(pipeline, given, found, None, restarts)

    def _shown(self, pipeline, given: Given, found, pick: int | None, restarts: int = 1):
        """(pictures of the first cases under what was found, their prompts); pick: one restart's for all."""
        count = min(PICTURES, len(given.prompts))
        rows = np.full(count, pick) if pick is not None else np.arange(count) * restarts
        if found.images is not None:
            return found.images[rows], [found.prompts[row] for row in rows]
        viewer = Viewer(pipeline, given, count)
        if found.latents is not None:
            start = found.latents[rows]
        else:
            start = viewer.noise(given.seeds[:count] if found.seeds is None else [found.seeds[row] for row in rows])
        cond = jax.tree.map(lambda x: np.asarray(x)[rows], found.conditioning)
        guidance = 1.0 if found.latents is not None else GUIDANCE
        images = attacked.sample_conditioning(pipeline, cond, start, steps=STEPS, guidance=guidance)
        return images, [found.prompts[row] for row in rows]
