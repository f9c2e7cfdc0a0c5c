"""Searches for words that bring the concept back: all prompts and restarts at once, through one compiled program.

A search goes by phases. In each, every row that has not succeeded takes the same number of gradient steps; then its
words are read off, decoded, tokenised again as a user's text would be, shown to the judge, and rows that succeed end.
Those left are packed into as few calls of the one compiled shape as hold them.
Shapes: R rows, k learnt tokens (padded), V tokens of the vocabulary, L tokens, d token width, h w C latents.
"""

import math
import time
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.attacks import spaces
from aegis_jax.attacks.given import Given, Viewer, case_numbers, groups, key_of, take
from aegis_jax.attacks.images import encode_images
from aegis_jax.attacks.prompt import insertion
from aegis_jax.attacks.result import BACKWARD, FAILED, NOT_NEEDED, SUCCEEDED, AttackResult
from aegis_jax.attacks.rows import Counter, per_call
from aegis_jax.attacks.search_steps import Fixed, Networks, steps
from aegis_jax.attacks.soft_prompt import networks
from aegis_jax.diffusion.conditioning import encode
from aegis_jax.diffusion.template import Template, padded
from aegis_jax.diffusion.threads import cores, side_by_side
from aegis_jax.diffusion.vocabulary import embeddings
from aegis_jax.errors import AegisError
from aegis_jax.models import clip

_SEARCH = 0x5EA4C4  # folded into the seed, so that no other part of the program draws the same numbers
DRAWN = -1  # as a phase's timestep: every step draws its own


@dataclass(frozen=True)
class Plan:
    """A search, in numbers.

    Attributes:
      method: the attack's name.
      space: what is moved (spaces.py).
      tokens: learnt tokens of each prompt.
      place: where they stand (prompt.INSERTIONS).
      timesteps: of each phase, or DRAWN.
      iterations: gradient steps of a phase.
      to_prediction: the goal is the original's prediction for what the picture was made from, otherwise the noise.
      keep_best: the row's prompt is the best of all phases and it ends with the last of them; otherwise it is the last
        phase's, and success ends the row.
      judged: images by which a prompt that was kept is judged; one that shows the concept is enough.
    """

    method: str
    space: spaces.Simplex | spaces.Nearest
    tokens: list[int]
    place: str
    timesteps: list[int]
    iterations: int
    restarts: int
    seed: int
    to_prediction: bool = False
    keep_best: bool = False
    judged: int = 1


class Search:
    """The rows of a search and how far each has come; `run` is the whole of it."""

    def __init__(self, pipeline, given: Given, plan: Plan, progress=None):
        self.pipeline, self.given, self.plan = pipeline, given, plan
        cases, restarts = len(given.prompts), plan.restarts
        self.case = np.repeat(np.arange(cases), restarts)
        self.on_cpu = jax.default_backend() == "cpu"
        self.net, self.fixed, self.said = _prepare(pipeline, given, plan, self.case)
        self.size, remat = per_call(len(self.case), math.prod(self.fixed.z_0.shape[1:3]))
        chunk = 1 if self.on_cpu else plan.iterations
        self.step = partial(steps, self.net, space=plan.space, chunk=chunk, remat=remat)
        start = partial(plan.space.start, table=self.net.table, tokens=max(plan.tokens))
        self.variable = start(jax.vmap(lambda key: jax.random.fold_in(key, _SEARCH))(self.fixed.key))
        self.moments = spaces.first_moments(plan.space, self.variable)
        self.losses = np.full((len(plan.timesteps) * plan.iterations, len(self.case)), np.nan, np.float32)
        self.ids = np.array(plan.space.settled(self.variable, self.net.table))
        self.words = self.ids.copy()  # of the prompt that counts, where those of the last phase need not
        self.score = np.full(len(self.case), -np.inf)
        self.viewer = Viewer(pipeline, given, self.size)
        self.start = self.viewer.noise([given.seeds[c] for c in range(cases)])
        self.seeds = [given.seeds[c] for c in self.case]  # that a row is shown with
        self.counter = Counter(progress, self.losses.size)
        self.trained = 0  # steps of all rows

    def run(self) -> AttackResult:
        began = time.perf_counter()
        outcomes = np.full(len(self.case), FAILED, object)
        if self.given.judge is not None:
            plain = self.viewer.shown(self.given.prompts, self.start)
            outcomes[plain[self.case]] = NOT_NEEDED
        left = np.flatnonzero(outcomes == FAILED)
        for phase, t in enumerate(self.plan.timesteps):
            if not len(left):
                break
            self._phase(left, phase, t)
            ended = self._look(left, phase)
            outcomes[left[ended]] = SUCCEEDED
            left = left[~ended]
        if self.plan.keep_best and self.given.judge is not None and len(left):
            outcomes[left[self._shown(left)]] = SUCCEEDED
        plain = np.flatnonzero(outcomes == NOT_NEEDED)
        return self._result(plain, outcomes, time.perf_counter() - began)

    def _phase(self, left, phase: int, t: int) -> None:
        """The phase's gradient steps, of the rows `left`."""
        first = phase * self.plan.iterations
        chunk = self.step.keywords["chunk"]

        def run(numbers):
            fixed, variable, moments = take((self.fixed, self.variable, self.moments), numbers)
            real, losses = len(set(numbers.tolist())), []
            for i in range(first, first + self.plan.iterations, chunk):
                variable, moments, some, ids = self.step(fixed, variable, moments, jnp.int32(t), jnp.int32(i))
                losses.append(np.asarray(some)[:, :real])
                self.counter(losses[-1].size, float(losses[-1].mean()))
            return numbers, variable, moments, np.concatenate(losses), np.asarray(ids)

        packed, at_once = groups(left, self.size), cores() if self.on_cpu else 1
        if phase == 0 and min(at_once, len(packed)) > 1:  # compiles, before several threads would each do so
            self.step(*take((self.fixed, self.variable, self.moments), packed[0]), jnp.int32(t), jnp.int32(0))
        for numbers, variable, moments, losses, ids in side_by_side(run, packed, at_once):
            put = lambda x, new, n=numbers: x.at[n].set(new)  # noqa: E731
            self.variable, self.moments = jax.tree.map(put, (self.variable, self.moments), (variable, moments))
            self.losses[first : first + self.plan.iterations, numbers[: losses.shape[1]]] = losses
            self.ids[numbers] = ids
        self.trained += len(left) * self.plan.iterations

    def _look(self, left, phase: int) -> np.ndarray:
        """Which of the rows `left` end with this phase, (n,) bool; what they found is kept where it counts."""
        never = np.zeros(len(left), bool)
        if not self.plan.keep_best:
            self.words[left] = self.ids[left]
            if self.given.judge is None:
                return never
            return self.viewer.shown(self.texts(left), self.start[self.case[left]])
        if self.given.similarity is None:
            now = slice(phase * self.plan.iterations, (phase + 1) * self.plan.iterations)
            score = -self.losses[now, left].mean(0)
        else:
            shown = self.viewer(self.texts(left, self.ids), self.start[self.case[left]])
            score = self.given.similarity(shown, self.given.images[self.case[left]])
        better = left[score > self.score[left]]
        self.score[left] = np.maximum(score, self.score[left])
        self.words[better] = self.ids[better]
        return never

    def _shown(self, left) -> np.ndarray:
        """Whether any of `judged` images of each row's prompt shows the concept; the first of its own seed.

        The seed of the first that does is kept as the row's.
        """
        found = np.zeros(len(left), bool)
        for k in range(self.plan.judged):
            seeds = [(self.given.seeds[c] + k) % 2**32 for c in self.case[left]]
            shown = self.viewer.shown(self.texts(left), self.viewer.noise(seeds))
            for i in np.flatnonzero(shown & ~found):
                self.seeds[left[i]] = seeds[i]
            found |= shown
        return found

    def tokens(self, row: int, ids) -> list[int]:
        """A row's prompt as tokens, BOS, EOS and padding left out; an EOS that was found too, as published."""
        gaps = iter(ids[row])
        said = [int(next(gaps)) if token is None else token for token in self.said[row]]
        return [token for token in said if token != self.pipeline.tokenizer.eos_token_id]

    def texts(self, numbers, ids=None) -> list[str]:
        return [self.pipeline.tokenizer.text(self.tokens(row, self.words if ids is None else ids)) for row in numbers]

    def _result(self, plain, outcomes, seconds: float) -> AttackResult:
        everyone = range(len(self.case))
        texts, rows = self.texts(everyone), [self.tokens(row, self.words) for row in everyone]
        for row in plain:
            texts[row] = self.given.prompts[self.case[row]]
            rows[row] = self.pipeline.tokenizer.tokens(texts[row])
        ids = np.stack([padded(self.pipeline.tokenizer, tokens).ids for tokens in rows])
        per_step = 1 + BACKWARD + (self.net.original is not None)
        return AttackResult(
            prompts=texts,
            conditioning=encode(self.pipeline, texts),
            losses=self.losses,
            ids=ids,
            same_tokens=(ids == self.pipeline.tokenizer.ids(texts)).all(1),
            outcomes=None if self.given.judge is None else [str(outcome) for outcome in outcomes],
            seeds=self.seeds,
            unet_evaluations=self.trained * per_step + self.viewer.unet_evaluations,
            seconds=seconds,
        )


def _prepare(pipeline, given: Given, plan: Plan, case) -> tuple[Networks, Fixed, list]:
    net = networks(pipeline, "", given.original if plan.to_prediction else None)
    text = pipeline.text_encoder
    ids = jnp.arange(min(pipeline.tokenizer.size, pipeline.tokenizer.vocabulary), dtype=jnp.int32)
    table = clip.embed(text.graph, net.text, ids[None])[0]
    templates, said = zip(*placed(pipeline, given.prompts, plan))
    base = key_of(plan.seed, _SEARCH)
    of_case = [jax.random.fold_in(base, number) for number in case_numbers(given)]
    keys = [jax.random.fold_in(key, r) for key in of_case for r in range(plan.restarts)]
    fixed = Fixed(
        template=jnp.stack([embeddings(pipeline, template.ids) for template in templates])[case],
        slots=jnp.stack([template.slots for template in templates])[case],
        z_0=encode_images(pipeline, given.images)[case],
        prompt=take(encode(given.original, given.made_from), case) if plan.to_prediction else None,
        key=jnp.stack(keys),
    )
    own = Networks(net.erased, net.original, net.text, table, net.text_graph)
    return own, fixed, [said[c] for c in case]


def placed(pipeline, prompts: list[str], plan: Plan) -> list[tuple[Template, list]]:
    """`insertion` of every prompt. Raises `AegisError` for one that does not fit."""
    insert = partial(insertion, pipeline.tokenizer, place=plan.place, method=plan.method)
    return [insert(prompt, tokens=count) for prompt, count in zip(prompts, plan.tokens, strict=True)]


def ascending(total: int, count: int, method: str) -> list[int]:
    """`count` timesteps of a schedule of `total`, evenly from the first half step up: 10, 30, ... 990 of 1000.

    Raises `AegisError`, which names the attack, for more than there are.
    """
    if count > total:
        raise AegisError(f"attack {method}: timesteps={count}, but the schedule has {total}")
    stride = total // count
    return list(range(stride // 2, total, stride))[:count]
