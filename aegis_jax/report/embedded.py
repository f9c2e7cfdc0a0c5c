"""An embedded world as the subject of an evaluation (subject.py): its own prompts and its own judge."""

import functools

import numpy as np

from aegis_jax import judges
from aegis_jax.attacks import METHODS
from aegis_jax.attacks.given import Given
from aegis_jax.errors import AegisError
from aegis_jax.evaluation import attacked, cases, retention, world
from aegis_jax.evaluation.metrics import similarity
from aegis_jax.evaluation.metrics.composition import composition
from aegis_jax.report.subject import CLIP_SCORE, DIAGNOSTICS, RETENTION, Column, distance_columns, near_column
from aegis_jax.world.quality import GUIDANCE, STEPS

RULERS = ("judge", "clip")
_PLAIN = (
    Column("plain", "plain prompts", "less", "summary"),
    Column("held_out", "held-out synonyms", "less", "summary"),
    Column("same", "kept: same attribute", "more", "summary"),
    Column("other", "kept: others", "more", "summary"),
    Column("open", "left open", "none", "summary", note="shown unasked"),
    Column("empty", "empty prompt", "none", "summary", note="shown unasked"),
)
_CANVAS = tuple(
    Column(name, title, "more", kind=RETENTION, note=note)
    for name, title, note in (
        ("UA", "UA", "unlearning"),
        ("IRA", "IRA", "same attribute"),
        ("CRA", "CRA", "others"),
        ("CRA_retained", "CRA, retained", "without the concept"),
        ("rest", "beside the concept", "each attribute"),
        ("rest_together", "beside the concept", "all at once"),
        ("together", "another value", "and all beside it"),
    )
)


class Embedded:
    """A world, with one of its values as the concept. See subject.py."""

    guidance, steps, usual, retains = GUIDANCE, STEPS, cases.SMALL, True
    kept = ("same", "other")

    def __init__(self, base, text: str, near=(), within: str = "world"):
        value = world.find(text, within)
        if value is None:
            raise AegisError(f"--concept {text!r} is not one value of the {within}: its judge cannot count it")
        if value.attribute not in value.world.domains:
            raise AegisError(
                f"--concept {text!r}: the {within}'s prompts do not state a {value.attribute} by itself; wanted a "
                f"{' or a '.join(value.world.domains)}"
            )
        self.base, self.concept, self.text = base, value, text
        self._named = retention.named_values(value, near)
        self.collected = functools.cache(lambda seed: attacked.attacker_images(base, value, seed=seed))
        self.cases = functools.cache(self._cases)
        self.without = functools.cache(lambda seed: cases.without(base, value, seed=seed))
        self.references = functools.cache(self._references)

    @property
    def columns(self) -> tuple[Column, ...]:
        sets = ("base",) if self.concept.world.render is None else ("real", "base")
        return (*_PLAIN, *_CANVAS, near_column("retention"), CLIP_SCORE, *distance_columns(RULERS, sets))

    @functools.cached_property
    def near(self) -> list[str]:
        return retention.near_values(self.base, self.concept, self._named)

    @property
    def words(self) -> list[str]:
        return [self.concept.value.name, self.concept.value.held_out[0], *self.near]

    def record(self, kind: str) -> dict:
        about = {"attribute": self.concept.attribute, "value": self.concept.value.name, "judge": self._judge.digest}
        about |= {"near": self.near} if kind in (RETENTION, DIAGNOSTICS) else {}
        if kind in METHODS and METHODS[kind].asks:
            about["second_judge"] = judges.load(f"{self.concept.within}:second").digest
        return about | {"guidance": GUIDANCE, "steps": STEPS, "clip": self._clip.digest}

    def about(self) -> dict:
        judge = self._judge.record(self.concept.value.name)
        named = {"world": self.concept.within, "attribute": self.concept.attribute, "value": self.concept.value.name}
        return named | {"near": self.near} | {"judge": judge, "clip": self._clip.digest}

    def control(self, word: str | None) -> str | None:
        return word

    def texts(self, n: int, seed: int, neutral: str | None) -> list[str]:
        return world.concept_prompts(self.concept, n, cases.case_seed(seed), word=neutral)

    def _cases(self, n: int, seed: int, neutral: str | None) -> list[Given]:
        return [cases.cases(self.base, self.concept, n, seed=seed, neutral=neutral)]

    def learnt(self, seed: int) -> Given:
        return cases.of_concept(self.base, self.concept, self.text, self.collected(seed))

    def lacks(self, attack: str) -> str | None:
        return None

    def shown(self, images) -> np.ndarray:
        return cases.shows(self.concept)(images)

    def plain(self, pipeline, n: int, seed: int):
        shares = world.measure(pipeline, self.concept, n=n, seed=seed)
        shares |= world.unasked(pipeline, self.concept, n=n, seed=seed)
        # "other" is a mean over attributes: the images are what is independent, and one may be right in some of them.
        parts = {column.name: 1 for column in _PLAIN} | {"other": len(self.concept.world.domains) - 1}
        figures = {name: {"count": _exact(shares[name] * n, of), "n": n} for name, of in parts.items()}
        return figures | {"agreement": shares["agreement"]}, 5 * n * 2 * STEPS

    def retention(self, pipeline, n: int, seed: int):
        shares = composition(pipeline, self.concept, self._judge, n=n, seed=seed)
        figures = {name: {key: share[key] for key in ("count", "n")} for name, share in shares.items()}
        near = retention.near_rates(pipeline, self.concept, self.near, self._judge, n=n, seed=seed)
        figures["near"] = {word: {key: share[key] for key in ("count", "n")} for word, share in near.items()}
        images, prompts = retention.drawn(pipeline, self.concept, n=n, seed=seed)
        figures |= retention.distances(self._rulers, images, self.references(n, seed))
        figures["clip_score"] = retention.scored(self._clip, images, prompts)
        return figures, (3 * n + near["all"]["n"]) * 2 * STEPS

    def _references(self, n: int, seed: int) -> dict:
        images = retention.references(self.base, self.concept, n=n, seed=seed)
        return retention.featured(self._rulers, {name: [rows] for name, rows in images.items()})

    @functools.cached_property
    def _judge(self):
        return judges.load(self.concept.within)

    @functools.cached_property
    def _clip(self):
        return similarity.embedder(self.concept.within)

    @property
    def _rulers(self) -> dict:
        return {"judge": self._judge.features, "clip": self._clip.features}


def _exact(count: float, parts: int) -> int | float:
    """A count in parts of an image, less what its division and multiplication have left."""
    whole, rest = divmod(round(count * parts), parts)
    return whole + rest / parts if rest else whole
