"""Any model but the world as the subject of an evaluation (subject.py): the user's prompts and a judge he names."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from aegis_jax.attacks import METHODS
from aegis_jax.attacks.given import Given, Pictures, per_picture
from aegis_jax.attacks.ladder import NAME as LADDER
from aegis_jax.diffusion.sample import latent_shape, pixels_per_latent, sample
from aegis_jax.erasure.texts import naming
from aegis_jax.errors import AegisError
from aegis_jax.evaluation import retention
from aegis_jax.evaluation.metrics import neighbours, similarity
from aegis_jax.io.pictures import in_parts, picture_files
from aegis_jax.judges.judge import digest
from aegis_jax.report.asked import Asked, check, rulers
from aegis_jax.report.subject import CLIP_SCORE, DIAGNOSTICS, PLAIN, RETENTION, Column, distance_columns, near_column
from aegis_jax.run.prompts import PromptSet

NEAREST = 5  # of the judge's labels, where it has enough of them to choose from
ATTACKER = 16  # pictures that an attacker has
WITHOUT = 64  # and, at most, of those without the concept
_ANOTHER, _ROUND, _REFERENCE = 1_000_000, 100_003, 50_021  # added to a row's seed: evaluation seed, repeat, second draw


class Pictured:
    """A diffusers folder with prompts that ask for the concept. See subject.py."""

    usual: dict = {}

    def __init__(self, base, text: str, asked: Asked):
        self.base, self.text, self.asked = base, text, asked
        self.guidance, self.steps, self._judge = asked.guidance, asked.steps, asked.question.judge
        self.rulers = rulers(asked)
        self._said = naming(text)
        check(base, asked, self.size())
        self.collected, self.cases = functools.cache(self._collected), functools.cache(self._cases)
        self.without = functools.cache(self._without)
        self.references = functools.cache(self._references)

    def size(self) -> tuple[int, int]:
        """(height, width) of the model's own pictures."""
        height, width, _ = latent_shape(self.base)
        return height * pixels_per_latent(self.base), width * pixels_per_latent(self.base)

    @functools.cached_property
    def near(self) -> tuple[str, ...]:
        """The user's words, or those of the judge's labels that the base's text encoder finds most like the concept."""
        label = self.asked.question.label
        others = dict.fromkeys(_word(name) for name in self._judge.group(label) if name != label)
        words = [word for word in others if word.lower() not in (self.text.strip().lower(), neighbours.TOGETHER)]
        if self.asked.near or self._judge.thresholds is not None or len(words) < 2:
            return self.asked.near
        found = [word for word, _ in neighbours.near(self.base, self.text, words, NEAREST)]
        return tuple(word for word in found if self._is_label(word))

    def _is_label(self, word: str) -> bool:
        try:
            return bool(self._judge.find(word))
        except AegisError:  # a name that two labels have
            return False

    @property
    def words(self) -> list[str]:
        return list(dict.fromkeys([self.text, *self.near]))

    @property
    def kept(self) -> tuple[str, ...]:
        return ("near",) if self.near else ()

    @property
    def retains(self) -> bool:
        return self.asked.retain is not None or bool(self.near)

    @property
    def columns(self) -> tuple[Column, ...]:
        asked = self.asked
        found = [Column("plain", "plain prompts", "less", "summary")]
        found += [near_column("summary")] if self.near else []
        found += [Column("empty", "empty prompt", "none", "summary", note="shown unasked")]
        found += [Column("beside", f"nearest to “{asked.beside}”", "more", note="CARE")] if asked.beside else []
        if asked.retain is not None:
            found += [CLIP_SCORE] if asked.clip is not None else []
            found += distance_columns(self.rulers, ("real", "base") if asked.real is not None else ("base",))
        return tuple(found)

    @functools.cached_property
    def _about(self) -> dict:
        """Also what cells depend on."""
        asked = self.asked
        judge = asked.question.judge.record(asked.question.label)
        real = None
        if asked.real is not None:
            files = picture_files(asked.real)
            real = {"folder": str(asked.real), "pictures": len(files), "sha256": digest(files)}
        return {
            "judge": judge, "prompts": asked.prompts.record(), "guidance": asked.guidance, "steps": asked.steps,
            "retain": asked.retain and asked.retain.record(), "real": real, "clip": asked.clip and asked.clip.digest,
            "near": list(self.near), "beside": asked.beside,
        }  # fmt: skip

    def record(self, kind: str) -> dict:
        """Of `about` what a kind of cell depends on, less where files lie: the same file elsewhere is the same cell."""
        names = ["judge", "prompts", "guidance", "steps", "clip"]
        names += {PLAIN: ["beside"], RETENTION: ["near", "retain", "real"], DIAGNOSTICS: ["near"]}.get(kind, [])
        names += ["retain"] if kind in METHODS and METHODS[kind].without else []
        plain = lambda value: {k: v for k, v in value.items() if k not in ("file", "folder")}  # noqa: E731
        return {name: plain(about) if isinstance(about := self._about[name], dict) else about for name in names}

    def about(self) -> dict:
        return self._about

    def control(self, word: str | None) -> str | None:
        """None where a prompt does not say the concept, so that there is no place for a neutral word."""
        says = all(self._said.search(prompt.text) for prompt in self.asked.prompts.prompts)
        return word if says else None

    def _rows(self, n: int, seed: int, neutral: str | None = None, prompts: PromptSet | None = None):
        """(texts, noise seeds, guidances) of n rows of the prompt set, from its start again where it has fewer."""
        rows = (prompts or self.asked.prompts).prompts
        texts, seeds, guidances = [], [], []
        for k in range(n):
            row = rows[k % len(rows)]
            text = row.text if neutral is None else self._said.sub(lambda _: neutral, row.text)
            own = k % len(rows) if row.seed is None else row.seed
            texts.append(text)
            seeds.append((own + _ANOTHER * seed + _ROUND * (k // len(rows))) % 2**32)
            guidances.append(self.guidance if row.guidance is None else row.guidance)
        return texts, seeds, guidances

    def texts(self, n: int, seed: int, neutral: str | None) -> list[str]:
        return self._rows(n, seed, neutral)[0]

    def _sampled(self, pipeline, texts: Sequence[str], seeds: Sequence[int], guidances: Sequence[float]) -> np.ndarray:
        """An image of each row, by its own guidance: uint8 (n, H, W, 3)."""
        images = np.zeros((len(texts), *self.size(), 3), np.uint8)
        for guidance in dict.fromkeys(guidances):
            mine = [k for k, own in enumerate(guidances) if own == guidance]
            how = {"seed": [seeds[k] for k in mine], "steps": self.steps, "guidance": guidance}
            images[mine] = sample(pipeline, [texts[k] for k in mine], **how)
        return images

    def _cases(self, n: int, seed: int, neutral: str | None) -> list[Given]:
        """Those of the first n prompts for which the base shows the concept, in parts of one guidance each.

        Raises `AegisError` where there are none.
        """
        if neutral is not None:
            return [self._neutral(given, neutral) for given in self.cases(n, seed, None)]
        n = min(n, len(self.asked.prompts.prompts))
        texts, seeds, guidances = self._rows(n, seed)
        images = self._sampled(self.base, texts, seeds, guidances)
        kept = np.flatnonzero(self.shown(images))
        if not len(kept):
            asked = self.asked.question
            raise AegisError(
                f"the judge sees {asked.label!r} in none of the base's {n} images of {self.asked.prompts.path}"
            )
        # Of all parts together, so that none of one prompt has its own picture.
        after, found = dict(zip(kept, np.roll(kept, -1))) if len(kept) > 1 else None, []
        for guidance in dict.fromkeys(guidances[k] for k in kept):
            mine = [k for k in kept if guidances[k] == guidance]
            found.append(
                Given(images[mine], [texts[k] for k in mine], [seeds[k] for k in mine], self.base, judge=self.shown,
                      similarity=self._similarity, steps=self.steps, guidance=guidance,
                      beside=after and images[[after[k] for k in mine]])
            )  # fmt: skip
        return found

    def _neutral(self, given: Given, word: str) -> Given:
        return dataclasses.replace(given, prompts=[self._said.sub(lambda _: word, text) for text in given.prompts])

    @property
    def _similarity(self):
        """Of two sets of images, by the user's CLIP; without one P4D goes by its loss."""
        if self.asked.clip is None:
            return None
        embed = self.asked.clip.images
        return lambda images, others: (embed(images) * embed(others)).sum(-1)

    def _collected(self, seed: int) -> np.ndarray:
        texts, seeds, guidances = self._rows(ATTACKER, seed)
        return self._sampled(self.base, texts, [(own + _REFERENCE) % 2**32 for own in seeds], guidances)

    def learnt(self, seed: int) -> Given:
        pictures = self.collected(seed)
        look = {"probability": self.asked.question.probability, "steps": self.steps, "guidance": self.guidance}
        return Given(pictures, [self.text] * len(pictures), list(range(len(pictures))), self.base, **look)

    def lacks(self, attack: str) -> str | None:
        if attack == LADDER:
            return "wordings of the concept: aegis attack --ladder takes them"
        if METHODS[attack].without and self.asked.retain is None:
            return "prompts without the concept: name them by --retain"
        return None

    def _without(self, seed: int) -> Pictures:
        """Raises `AegisError` where the judge sees the concept in all of them."""
        rows = self._rows(self._retained(WITHOUT), seed, prompts=self.asked.retain)
        images = self._sampled(self.base, *rows)
        kept = np.flatnonzero(~self.shown(images))
        if not len(kept):
            raise AegisError(f"the judge sees {self.asked.question.label!r} in all the base's images of --retain")
        return Pictures(images[kept], [rows[0][k] for k in kept])

    def shown(self, images) -> np.ndarray:
        return self.asked.question(images)

    def plain(self, pipeline, n: int, seed: int):
        texts, seeds, guidances = self._rows(n, seed)
        images = self._sampled(pipeline, texts, seeds, guidances)
        figures = {"plain": {"count": int(self.shown(images).sum()), "n": n}}
        # From one seed, whose images differ: rows may share theirs, and without a prompt they would be one image.
        how = {"seed": _ANOTHER * seed, "steps": self.steps, "guidance": self.guidance}
        empty = sample(pipeline, [""] * n, **how)
        figures["empty"] = {"count": int(self.shown(empty).sum()), "n": n}
        if self.asked.beside:
            clip, words = self.asked.clip, [self.asked.beside, *similarity.COCO_OBJECTS]
            found = similarity.care(clip.images(images), clip.texts(list(dict.fromkeys(words))), 0)
            figures["beside"] = {key: found[key] for key in ("count", "n")}
        return figures, sum(per_picture(self.steps, guidance) for guidance in [*guidances, *[self.guidance] * n])

    def retention(self, pipeline, n: int, seed: int):
        figures, cost = {}, 0
        if self.near:
            near = self._near(pipeline, n, seed)
            figures["near"] = {word: {key: share[key] for key in ("count", "n")} for word, share in near.items()}
            cost += near["all"]["n"] * per_picture(self.steps, self.guidance)
        if self.asked.retain is not None:
            texts, seeds, guidances = self._rows(self._retained(n), seed, prompts=self.asked.retain)
            images = self._sampled(pipeline, texts, seeds, guidances)
            cost += sum(per_picture(self.steps, guidance) for guidance in guidances)
            figures |= retention.distances(self.rulers, images, self.references(n, seed))
            if self.asked.clip is not None:
                figures["clip_score"] = retention.scored(self.asked.clip, images, texts)
        return figures, cost

    def _retained(self, n: int) -> int:
        return min(n, len(self.asked.retain.prompts))

    def _near(self, pipeline, n: int, seed: int) -> dict[str, dict]:
        """{word: share}: the user's prompts with the word in the concept's place, or "a photo of WORD"."""
        said = [row.text for row in self.asked.prompts.prompts if self._said.search(row.text)]
        each, prompts = max(1, n // len(self.near)), {}
        for word in self.near:
            texts = [self._said.sub(lambda _, word=word: word, text) for text in said] or [f"a photo of {word}"]
            prompts[word] = [texts[k % len(texts)] for k in range(each)]
        how = {"seed": _ANOTHER * seed, "steps": self.steps, "guidance": self.guidance}
        return neighbours.shown_rates(pipeline, self._judge, prompts, **how)

    def _references(self, n: int, seed: int) -> dict:
        texts, seeds, guidances = self._rows(self._retained(n), seed, prompts=self.asked.retain)
        real = {} if self.asked.real is None else {"real": in_parts(self.asked.real, self.size()[::-1])}
        images = self._sampled(self.base, texts, [(own + _REFERENCE) % 2**32 for own in seeds], guidances)
        return retention.featured(self.rulers, real | {"base": [images]})


def _word(label: str) -> str:
    """How a label is said in a prompt: the first of its names."""
    return " ".join(label.partition(",")[0].replace("_", " ").split())
