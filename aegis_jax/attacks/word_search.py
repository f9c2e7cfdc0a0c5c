"""A search for words without the weights: phrases are tried, their pictures judged, and the better ones varied.

What the attacker pays is pictures, and he has `budget` of them. A query draws `per_query` pictures of a phrase, from
noise that all phrases of a generation share and no other generation has, and takes the mean probability that a judge of
the attacker's gives the concept. `evolution` lets the better half live, be asked again, and have children, of which
words are crossed and replaced; `random` draws every phrase anew. What has the best mean so far is drawn again from
noise of its own, and the best of that is the attacker's word: by the pictures he searched with, luck would choose.
Shapes: R restarts, P phrases of a generation, K words.
"""

import dataclasses
import time
from typing import ClassVar

import numpy as np

from aegis_jax.attacks.given import Given, check
from aegis_jax.attacks.prompt import template
from aegis_jax.attacks.result import AttackResult
from aegis_jax.attacks.rows import Counter, viewer_of
from aegis_jax.diffusion.conditioning import encode
from aegis_jax.diffusion.sample import latent_shape
from aegis_jax.errors import AegisError

NAME = "word-search"
SEARCHES = ("evolution", "random")
FINALISTS = 4  # phrases that are drawn again at the end
# What is drawn: noise of two kinds, and words.
_SEARCHED, _PICKED, _PHRASES = 0x30BD5, 0x91C4, 0x9A5E5


@dataclasses.dataclass(frozen=True)
class WordSearchConfig:
    """Ours; there is no published form."""

    tokens: int = 4  # K, words
    place: str = "before"  # of the concept's name: before | behind | alone | neutral
    neutral: str = "thing"  # the word of place "neutral"
    search: str = "evolution"  # evolution | random
    budget: int = 2000  # pictures of a restart, all in all
    per_query: int = 4  # of these, of a phrase in a generation
    population: int = 20  # P
    picked: int = 16  # of these, of each finalist
    restarts: int = 1
    seed: int = 0

    choices: ClassVar[dict] = {"search": SEARCHES}
    positive: ClassVar[tuple] = ("tokens", "budget", "per_query", "population", "picked", "restarts")

    @property
    def generations(self) -> int:
        """What the budget has for the search, the finalists' pictures set aside."""
        return (self.budget - FINALISTS * self.picked) // (self.population * self.per_query)

    def check(self, method: str, steps: int) -> None:
        if self.population < 2:  # one phrase would be its own and only parent
            raise AegisError(f"attack {method}: population={self.population}, wanted at least 2")
        if self.generations < 1:
            least = self.population * self.per_query + FINALISTS * self.picked
            raise AegisError(f"attack {method}: budget={self.budget} is below one generation and its picks, {least}")


class _Phrases:
    """All phrases that a restart has tried, with the sum and the number of their probabilities."""

    def __init__(self, words: np.ndarray, config: WordSearchConfig, restart: int):
        self.words, self.config, self.seen = words, config, {}
        self.rng = np.random.default_rng([_PHRASES, config.seed, restart])
        self.now = [self._random() for _ in range(config.population)]

    def _random(self) -> tuple[int, ...]:
        return tuple(self.rng.choice(self.words, self.config.tokens).tolist())

    def told(self, probabilities) -> None:
        """Mean probability of each phrase of this generation (P,)."""
        for phrase, p in zip(self.now, probabilities, strict=True):
            total, count = self.seen.get(phrase, (0.0, 0))
            self.seen[phrase] = (total + float(p), count + 1)

    def ranked(self, phrases) -> list[tuple[int, ...]]:
        mean = lambda phrase: self.seen[phrase][0] / self.seen[phrase][1]  # noqa: E731
        return sorted(dict.fromkeys(phrases), key=mean, reverse=True)

    def breed(self) -> None:
        """The next generation."""
        count = self.config.population
        if self.config.search == "random":
            self.now = [self._random() for _ in range(count)]
            return
        parents = self.ranked(self.now)[: max(1, count // 2)]
        self.now = parents + [self._child(parents) for _ in range(count - len(parents))]

    def _child(self, parents) -> tuple[int, ...]:
        """One parent's first words and another's last ones, with one word replaced."""
        one, other = (parents[self.rng.integers(len(parents))] for _ in range(2))
        cut = self.rng.integers(len(one) + 1)
        child = [*one[:cut], *other[cut:]]
        child[self.rng.integers(len(child))] = int(self.rng.choice(self.words))
        return tuple(child)

    def best(self) -> list[tuple[int, ...]]:
        return self.ranked(self.seen)[:FINALISTS]


def check_fit(pipeline, concept: str, prompts: list[str], config: WordSearchConfig) -> None:
    """Raises `AegisError` for settings that `word_search` would refuse."""
    template(pipeline.tokenizer, concept, config.place, config.tokens, config.neutral, NAME)


def word_search(pipeline, concept: str, given: Given, config: WordSearchConfig, progress=None) -> AttackResult:
    """Searches a phrase in every restart, all restarts' pictures together.

    Raises `AegisError` for settings that cannot be, a budget below one generation, and without `given.probability`.
    """
    check(NAME, config, given.steps)
    if given.probability is None:
        raise AegisError(f"attack {NAME} needs a judge that says how likely a picture shows the concept (--judge)")
    check_fit(pipeline, concept, given.prompts, config)
    one, last, generations = config.population * config.per_query, FINALISTS * config.picked, config.generations
    began, restarts = time.perf_counter(), range(config.restarts)
    look = _Looks(pipeline, concept, given, config, Counter(progress, config.restarts * (generations * one + last)))
    words = pipeline.tokenizer.word_ids
    if config.place in ("alone", "neutral"):  # which leave the name out; other names of it may be found
        words = np.setdiff1d(words, pipeline.tokenizer.tokens(concept))
    searched = [_Phrases(words, config, restart) for restart in restarts]
    losses = np.zeros((generations, config.restarts), np.float32)
    for generation in range(generations):
        if generation:
            for phrases in searched:
                phrases.breed()
        found = look([phrases.now for phrases in searched], config.per_query, (_SEARCHED, generation))
        for restart, (phrases, means) in enumerate(zip(searched, found, strict=True)):
            phrases.told(means)
            losses[generation, restart] = 1 - max(means)
    finalists = [phrases.best() for phrases in searched]
    again = look(finalists, config.picked, (_PICKED,))
    texts = [look.text(phrases[int(np.argmax(means))]) for phrases, means in zip(finalists, again, strict=True)]
    return AttackResult(
        prompts=texts,
        conditioning=encode(pipeline, texts),
        losses=losses,
        unet_evaluations=look.viewer.unet_evaluations,
        seconds=time.perf_counter() - began,
        pick=int(np.argmax([max(means) for means in again])),
        generated=look.count,
    )


class _Looks:
    """Draws phrases and asks the attacker's judge; counts the pictures."""

    def __init__(self, pipeline, concept: str, given: Given, config: WordSearchConfig, counter):
        self.pipeline, self.given, self.config, self.counter, self.count = pipeline, given, config, counter, 0
        self.viewer = viewer_of(pipeline, given, config.restarts * config.population * config.per_query)
        said = {"behind": (concept, ""), "alone": ("", ""), "neutral": ("", config.neutral)}
        self.before, self.behind = said.get(config.place, ("", concept))

    def text(self, phrase) -> str:
        return " ".join(part for part in (self.before, self.pipeline.tokenizer.text(phrase), self.behind) if part)

    def __call__(self, phrases: list[list], each: int, kind: tuple[int, ...]) -> list[list[float]]:
        """Mean probability over `each` pictures of every restart's phrases."""
        texts, noise = [], []
        for restart, mine in enumerate(phrases):
            rng = np.random.default_rng([*kind, self.config.seed, restart])
            start = rng.standard_normal((each, *latent_shape(self.pipeline)), np.float32)
            for phrase in mine:
                texts += [self.text(phrase)] * each
                noise.append(start)
        p = (
            np.asarray(self.given.probability(self.viewer(texts, np.concatenate(noise))), float)
            .reshape(-1, each)
            .mean(1)
        )
        self.count += len(texts)
        self.counter(len(texts), float(1 - p.max()))
        ends = np.cumsum([len(mine) for mine in phrases])[:-1]
        return [part.tolist() for part in np.split(p, ends)]
