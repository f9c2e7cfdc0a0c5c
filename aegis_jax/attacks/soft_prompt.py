"""White-box soft prompts: learnable token embeddings in the concept's prompt, fitted to images of the concept.

The attacker holds the weights and images of the concept. Over k token embeddings, put where prompt.py says, he
minimises one of two losses on his images, noised:

  denoising    the distance from the erased model's prediction to the noise
  prediction   the distance from the erased model's prediction to what the model before erasure predicts for the concept
               (P4D's loss)

Both are taken on images and noise that he held out, too; by his own he picks the best of his restarts. Nothing here
bounds what an attack can do: a prompt that gradient descent did not find may still exist.

Every row of a call is a restart of a member (a config) of its own: what differs between them are arrays, so that one
program serves all members, and rows of several share each call of the network.
Shapes: R rows, K soft tokens (padded), L tokens, d token width, B images per row and step.
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.attacks import prompt, rows
from aegis_jax.attacks.given import check, key_of
from aegis_jax.attacks.images import encode_images, split
from aegis_jax.attacks.result import BACKWARD, PLACEHOLDER, AttackResult
from aegis_jax.attacks.rows import Data, Networks, Rows
from aegis_jax.diffusion.conditioning import encode, encode_tokens
from aegis_jax.diffusion.schedule import make_schedule
from aegis_jax.diffusion.template import Template, fill
from aegis_jax.diffusion.vocabulary import embeddings, random_words
from aegis_jax.errors import AegisError

GOALS = ("denoising", "prediction")
PADDED_TOKENS = 8  # rows of up to so many soft tokens share a program
HELD_OUT = 128  # noised images that restarts are compared on
_ATTACK = 0xA77AC4  # folded into the seed, so that attack and erasure never share random numbers


@dataclasses.dataclass(frozen=True)
class SoftPromptConfig:
    """One member of the family of soft-prompt attacks."""

    tokens: int = 4  # k
    place: str = "before"  # before | behind | alone | neutral
    goal: str = "denoising"  # denoising | prediction, which needs the model before erasure
    neutral: str = "thing"  # the word of place "neutral"; one token of the vocabulary
    restarts: int = 5  # from different random words
    steps: int = 200
    learning_rate: float = 1e-2  # of Adam, decaying to 0, in units of a token embedding's coordinates
    batch: int = 8  # images per restart and step, and the most per call of the VAE
    seed: int = 0

    choices: ClassVar[dict] = {"goal": GOALS}
    positive: ClassVar[tuple] = ("tokens", "restarts", "steps", "batch", "learning_rate")


def soft_prompt(pipeline, concept: str, images, config: SoftPromptConfig, progress=None, *, original=None):
    """Runs one member: an `AttackResult`. See `attacks.attack` and `soft_prompts`."""
    return soft_prompts(pipeline, concept, images, {"": config}, original=original, progress=progress)[""]


def soft_prompts(
    pipeline, concept: str, images, members: Mapping[str, SoftPromptConfig], *, original=None, progress=None
) -> dict[str, AttackResult]:
    """Runs members of the family, those with equal steps, batch and seed together.

    images: uint8 (m, H, W, 3), of the concept. original: the pipeline before erasure, for the goal "prediction".
    progress: called with (row-steps done, in all, mean loss). A restart's result depends on its member's settings
    alone, to rounding, not on what runs beside it.
    Raises `AegisError` for settings that cannot be, a prompt that does not fit the text encoder, or a missing original.
    """
    for config in members.values():
        _check(config, original)
    net = networks(pipeline, concept, original)
    gaps = {name: placed(pipeline.tokenizer, concept, config) for name, config in members.items()}
    together: dict = {}
    for name, config in members.items():
        together.setdefault((config.steps, config.batch, config.seed), []).append(name)
    counter = rows.Counter(progress, sum(config.restarts * config.steps for config in members.values()))
    found = {}
    for (steps, batch, seed), names in together.items():
        began = time.perf_counter()
        configs = {name: members[name] for name in names}
        batched = first_rows(pipeline, configs, gaps)
        data = _data(encode_images(pipeline, images, batch), seed)
        batched, losses, held_out, calls = rows.fit(net, batched, data, steps=steps, batch=batch, counter=counter)
        # A row's share of what the rows of a call have in common: the original's predictions, and time.
        originals = calls * (steps * batch + HELD_OUT) * (original is not None) / len(losses.T)
        seconds = (time.perf_counter() - began) / len(losses.T)
        start = 0
        for name, config in configs.items():
            mine = slice(start, start + config.restarts)
            start = mine.stop
            one = jax.tree.map(lambda x, mine=mine: x[mine], batched)
            told = losses[:, mine], held_out[:, mine], originals, seconds
            found[name] = _result(net, concept, config, gaps[name], one, *told)
    return {name: found[name] for name in members}


def placed(tokenizer, concept: str, config: SoftPromptConfig) -> Template:
    return prompt.template(tokenizer, concept, config.place, config.tokens, config.neutral)


def check_fit(pipeline, concept: str, prompts: list[str], config: SoftPromptConfig) -> None:
    """Raises `AegisError` for a place, tokens and words that `soft_prompts` would refuse."""
    placed(pipeline.tokenizer, concept, config)


def _check(config: SoftPromptConfig, original) -> None:
    check("soft_prompt", config, steps=1)  # it draws no picture
    if config.goal == "prediction" and original is None:
        raise AegisError("attack soft_prompt: goal='prediction' needs the model before erasure; pass it as original")


def networks(pipeline, concept: str, original=None) -> Networks:
    """What the losses are computed with. Raises `AegisError` if `original` noises images otherwise."""
    text, schedule = pipeline.text_encoder, make_schedule(pipeline.scheduler)
    before = None
    if original is not None:
        before = rows.Denoiser(original.unet.params, make_schedule(original.scheduler), original.unet.graph)
        if not np.array_equal(before.schedule.alphas_cumprod, schedule.alphas_cumprod):
            raise AegisError("the model before erasure has another noise schedule: it is not this model's original")
    return Networks(
        erased=rows.Denoiser(pipeline.unet.params, schedule, pipeline.unet.graph),
        text=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), text.params),
        original=before,
        concept=None if original is None else encode(original, concept),
        text_graph=text.graph,
    )


def first_rows(pipeline, members: Mapping[str, SoftPromptConfig], gaps: Mapping[str, Template]) -> Rows:
    """Every restart of every member as it starts: from random whole words, by (seed, restart) alone."""
    text, words = pipeline.text_encoder, jnp.asarray(pipeline.tokenizer.word_ids, jnp.int32)
    start = partial(random_words, text.graph, text.params, words)
    padded = max(PADDED_TOKENS, *(config.tokens for config in members.values()))
    parts = []
    for name, config in members.items():
        key, _ = _keys(config.seed)
        count, template = config.restarts, gaps[name]
        own = max(PADDED_TOKENS, config.tokens)  # not `padded`: what is drawn may depend on how much is
        soft = jnp.stack([start(jax.random.fold_in(key, r), (own,)) for r in range(count)])
        soft = jnp.pad(soft, ((0, 0), (0, padded - own), (0, 0)))
        each = lambda x, count=count: jnp.broadcast_to(x, (count, *jnp.shape(x)))  # noqa: E731
        parts.append(
            Rows(
                soft=jnp.where((jnp.arange(padded) < config.tokens)[:, None], soft, 0),
                template=each(embeddings(pipeline, template.ids)),
                slots=each(template.slots),
                learning_rate=each(jnp.float32(config.learning_rate)),
                to_prediction=each(jnp.bool(config.goal == "prediction")),
            )
        )
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _keys(seed: int):
    """(key of the starts, key of the draws)."""
    return jax.random.split(key_of(seed, _ATTACK))


def _data(z_0, seed: int) -> Data:
    train, held_out = split(len(z_0))
    steps, chosen = jax.random.split(_keys(seed)[1])
    return Data(z_0[train], z_0[held_out], steps, chosen, HELD_OUT)


def _result(
    net: Networks, concept, config, template, found: Rows, losses, held_out, originals: float, seconds: float
) -> AttackResult:
    """originals, seconds: of a restart."""
    goals = GOALS if net.original is not None else GOALS[:1]
    held_out = dict(zip(goals, held_out, strict=False))
    said = {"behind": [concept, PLACEHOLDER], "alone": [PLACEHOLDER], "neutral": [PLACEHOLDER, config.neutral]}
    return AttackResult(
        prompts=[" ".join(said.get(config.place, [PLACEHOLDER, concept]))] * config.restarts,
        soft_tokens=np.asarray(found.soft[:, : config.tokens]),
        template=template,
        conditioning=encode_tokens(net.text_graph, net.text, fill(found.template, found.slots, found.soft)),
        losses=losses,
        held_out=held_out,
        pick=int(np.argmin(np.nan_to_num(held_out[config.goal], nan=np.inf))),
        unet_evaluations=config.restarts * (originals + config.steps * config.batch * (1 + BACKWARD) + HELD_OUT),
        seconds=seconds * config.restarts,
    )
