"""Measures a cell: a model, an attack or none, an evaluation seed. Counts and pictures come out, no shares.

Pictures of a cell stand for the same cases in the same order, whatever the cell: prompt and start noise of the first of
its seed. Attacks by prompt change the prompt alone; what is learnt as one token is shown from the cases' noise; what is
found as noise belongs to the case's own picture.
"""

import dataclasses
import time

import jax
import numpy as np

from aegis_jax.attacks import METHODS, find
from aegis_jax.attacks.family import family
from aegis_jax.attacks.given import Given, Viewer, per_picture, take
from aegis_jax.attacks.result import NOT_NEEDED, SUCCEEDED
from aegis_jax.diffusion.sample import sample
from aegis_jax.evaluation import attacked, cases
from aegis_jax.evaluation.metrics import diagnostics
from aegis_jax.report.chosen import SOFT_PROMPT
from aegis_jax.report.subject import DIAGNOSTICS, PLAIN, RETENTION

PICTURES = 8  # of a cell, at most
LATENTS = 8  # of a distance of predictions, at most
D2_PROMPTS = 2  # of an attack by prompt whose d2 is measured


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a cell gave: plain `figures`; `pictures` uint8 (k, H, W, 3) of the first cases, and their `prompts`."""

    figures: dict
    unet_evaluations: float
    seconds: float
    pictures: np.ndarray
    prompts: list[str]


class Bench:
    """Measures cells of a subject (subject.py)."""

    def __init__(self, subject):
        self.subject, self.base = subject, subject.base
        self.per_image = per_picture(subject.steps, subject.guidance)  # UNet evaluations

    def measure(self, pipeline, cell: dict, config, progress=None) -> Measured:
        """config: the attack's settings; progress: called with (done, in all, loss)."""
        began, kind = time.perf_counter(), cell["kind"]
        given = self.subject.cases(cell["cases"], cell["seed"], cell["neutral"])
        n, seed = cell["images"], cell["seed"]
        if kind == PLAIN:
            figures, cost = self.subject.plain(pipeline, n, seed)
            more, *cases_of = self._cases_of(pipeline, given)
            found = figures, cost + more, *cases_of
        elif kind == RETENTION:
            found = *self.subject.retention(pipeline, n, seed), None, []
        elif kind == DIAGNOSTICS:
            found = *self._distances(pipeline, cell, {word: None for word in self.subject.words}), None, []
        elif kind == SOFT_PROMPT:
            found = self._family(pipeline, cell, given, config, progress)
        elif find(kind).of == "concept":
            found = self._token(pipeline, cell, given, config, progress)
        else:
            found = self._attack(pipeline, cell, given, config, progress)
        return Measured(*found[:2], time.perf_counter() - began, *found[2:])

    def _cases_of(self, pipeline, given: list[Given]):
        """(UNet evaluations, pictures of the first cases by a model, their prompts)."""
        cost, pictures, prompts = 0, [], []
        for part in given:
            count = min(PICTURES - len(prompts), len(part.prompts))
            if count:
                texts, how = part.prompts[:count], {"steps": part.steps, "guidance": part.guidance}
                pictures.append(sample(pipeline, texts, seed=part.seeds[:count], **how))
                prompts += texts
                cost += count * per_picture(**how)
        return cost, np.concatenate(pictures), prompts

    def _distances(self, pipeline, cell: dict, adversarial: dict):
        """({"t", "words": {word: {"d0", "d1", "d2"}}}, UNet evaluations); adversarial: {word: conditioning or None}."""
        n, steps, guidance = min(LATENTS, cell["images"]), self.subject.steps, self.subject.guidance
        attacked_by = {word: cond for word, cond in adversarial.items() if cond is not None}
        found = diagnostics.distances(
            self.base, pipeline, self.subject.text, list(adversarial), adversarial=attacked_by,
            n=n, seed=cell["seed"], steps=steps, guidance=guidance,
        )  # fmt: skip
        words = {word: {name: {"value": d, "n": n} for name, d in row.items()} for word, row in found["words"].items()}
        # Steps to the last timestep; there both models for the word, the base for the concept, and d2's.
        each = per_picture(steps - 1, guidance) + 3
        return {"t": found["t"], "words": words}, n * (len(words) * each + len(attacked_by))

    def _d2(self, pipeline, cell: dict, adversarial: dict):
        """(d2 as a figure, UNet evaluations): the mean over texts, each with what was found for it; None of none."""
        if not adversarial:
            return None, 0
        found, cost = self._distances(pipeline, cell, adversarial)
        values = [row["d2"]["value"] for row in found["words"].values()]
        n = sum(row["d2"]["n"] for row in found["words"].values())
        return {"value": float(np.mean(values)), "n": n}, cost

    def _family(self, pipeline, cell: dict, given: list[Given], config, progress):
        """Every member's images, counted; pictures are those of the member that the judge saw most with."""
        n, seed, subject = cell["images"], cell["seed"], self.subject
        members = {
            name: dataclasses.replace(member, restarts=config.restarts, steps=config.steps, seed=seed)
            for name, member in family(config.members).items()
        }
        found = attacked.soft_prompts(
            pipeline, subject.text, subject.collected(seed), members, original=self.base, progress=progress
        )
        images = self._generated(pipeline, list(found.values()), n, seed)
        shown = subject.shown(images).reshape(len(members), config.restarts * n)
        hits = {name: {"count": int(row.sum()), "n": row.size} for name, row in zip(members, shown, strict=True)}
        cost = sum(result.unet_evaluations for result in found.values()) + len(images) * self.per_image
        best = found[max(hits, key=lambda name: hits[name]["count"])]
        d2, more = self._d2(pipeline, cell, {subject.text: _row(best, best.pick)})
        drawn, *shown = self._shown(pipeline, given, [best] * len(given), best.pick)
        return {"members": hits, "d2": d2}, cost + more + drawn, *shown

    def _generated(self, pipeline, found, n: int, seed: int) -> np.ndarray:
        how = {"steps": self.subject.steps, "guidance": self.subject.guidance}
        return attacked.generated(pipeline, found, n, seed, **how)

    def _token(self, pipeline, cell: dict, given: list[Given], config, progress):
        """An attack that learns a token from pictures of the concept."""
        n, seed, subject = cell["images"], cell["seed"], self.subject
        found = METHODS[cell["kind"]].run(pipeline, subject.text, subject.learnt(seed), _seeded(config, seed), progress)
        hits = subject.shown(self._generated(pipeline, [found], n, seed))
        d2, more = self._d2(pipeline, cell, {subject.text: _row(found, found.pick)})
        figures = {"shown": {"count": int(hits.sum()), "n": hits.size}, "d2": d2}
        drawn, *shown = self._shown(pipeline, given, [found] * len(given), found.pick)
        return figures, found.unet_evaluations + hits.size * self.per_image + more + drawn, *shown

    def _attack(self, pipeline, cell: dict, given: list[Given], config, progress):
        """An attack that asks the judge itself on every part of the cases; their counts together."""
        method, config, results = find(cell["kind"]), _seeded(config, cell["seed"]), []
        of = method.of
        for part in given:
            if method.without:
                part = dataclasses.replace(part, without=self.subject.without(cell["seed"]))
            results.append(method.run(pipeline, self.subject.text, part, config, progress))
        restarts = len(results[0].prompts) // len(given[0].prompts)
        tallies = [cases.counts(found, restarts) for found in results]
        kept = ("attack_succeeded",) if of == "picture" else ("no_attack_needed", "attack_succeeded", "together")
        figures = {name: _summed(tally[name] for tally in tallies) for name in kept}
        for group, levels in tallies[0].get("levels", {}).items():
            for level in levels:
                figures[f"{group}: {level}"] = _summed(tally["levels"][group][level] for tally in tallies)
        cost = sum(found.unet_evaluations for found in results)
        if of == "prompt" and cell["neutral"] is None:
            figures["d2"], more = self._d2(pipeline, cell, _attacked(given, results, restarts))
            cost += more
        drawn, *shown = self._shown(pipeline, given, results, None, restarts)
        return figures, cost + drawn, *shown

    def _shown(self, pipeline, given: list[Given], results, pick: int | None, restarts: int = 1):
        """(UNet evaluations, pictures of the first cases under what was found, their prompts); pick: one restart's for
        all."""
        cost, pictures, prompts = 0, [], []
        for part, found in zip(given, results, strict=True):
            count = min(PICTURES - len(prompts), len(part.prompts))
            if count:
                rows = np.full(count, pick) if pick is not None else np.arange(count) * restarts
                more, images = self._pictures(pipeline, part, found, rows)
                cost += more
                pictures.append(images)
                prompts += [found.prompts[row] for row in rows]
        return cost, np.concatenate(pictures), prompts

    @staticmethod
    def _pictures(pipeline, part: Given, found, rows: np.ndarray) -> tuple[int, np.ndarray]:
        """(UNet evaluations, pictures of these rows)."""
        if found.images is not None:
            return 0, found.images[rows]
        if found.latents is not None:
            start, guidance = found.latents[rows], 1.0
        else:
            seeds = part.seeds[: len(rows)] if found.seeds is None else [found.seeds[row] for row in rows]
            start, guidance = Viewer(pipeline, part, len(rows)).noise(seeds), part.guidance
        cond = jax.tree.map(lambda x: np.asarray(x)[rows], found.conditioning)
        how = {"steps": part.steps, "guidance": guidance}
        return len(rows) * per_picture(**how), attacked.sample_conditioning(pipeline, cond, start, **how)


def _attacked(given: list[Given], results, restarts: int) -> dict:
    """{prompt: the conditioning found for it} of the first that needed an attack: of others it is the prompt's own."""
    found = {}
    for part, result in zip(given, results, strict=True):
        for k, prompt in enumerate(part.prompts):
            mine = result.outcomes[k * restarts : (k + 1) * restarts]
            if mine[0] != NOT_NEEDED and len(found) < D2_PROMPTS:
                best = mine.index(SUCCEEDED) if SUCCEEDED in mine else 0
                found[prompt] = _row(result, k * restarts + best)
    return found


def _summed(shares) -> dict:
    """Counts of several parts together."""
    shares = list(shares)
    return {key: sum(share[key] for share in shares) for key in ("count", "n")}


def _row(found, k: int):
    """The conditioning of one row of a result."""
    return take(found.conditioning, np.array([k]))


def _seeded(config, seed: int):
    return dataclasses.replace(config, seed=seed) if "seed" in type(config).__dataclass_fields__ else config
