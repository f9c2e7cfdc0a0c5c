"""From a pipeline, concepts and a config to AdvUnlearn's first state, and what it never changes.

Shapes: K concepts, R prompts to retain, L tokens, k soft tokens, d token-embedding width.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import Conditioning
from aegis_jax.diffusion.template import padded
from aegis_jax.diffusion.vocabulary import random_words
from aegis_jax.erasure import adam, latents, trainable
from aegis_jax.erasure.advunlearn.config import AdvUnlearnConfig, check
from aegis_jax.erasure.networks import SETUP, Networks, embed_ids, encode_rows, networks, refuse_mesh, trained
from aegis_jax.erasure.programs import pytree
from aegis_jax.erasure.texts import concept_tokens, known, naming
from aegis_jax.errors import AegisError

# The default prompts to retain: everyday things, and shapes that a small model knows too. Published are 243 of COCO's
# objects.
_THINGS = "dog cat bird horse cow tree flower boat car train bicycle chair table lamp book cup apple bread shoe clock"
_SHAPES = "circle square triangle heart star cross ring moon"
_COLOURS = "red blue green yellow purple"
NEUTRAL = (
    *(f"a photo of a {thing}" for thing in [*_THINGS.split(), *_SHAPES.split()]),
    *(f"a {colour} {shape}" for colour, shape in zip(_COLOURS.split() * 2, _SHAPES.split())),
)


@pytree(data="step drift opt_state p latents")
@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from step to step.

    Attributes:
      step: int32 scalar, steps done.
      drift: theta - theta0 of the trainable tensors, float32, stacked (groups.py). opt_state: Adam's moments of it.
      p: the soft tokens that the last attack on each concept has found, (K, k, d).
      latents: pools of trajectories: "erase" of the concepts, "retain" of the prompts; empty where draws are fresh.
    """

    step: jax.Array
    drift: dict
    opt_state: Any
    p: jax.Array
    latents: dict


@pytree(data="net plain template concept_emb retained retained_emb")
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a run reads and never changes.

    Attributes:
      net: theta0's networks.
      plain, template: token embeddings of [BOS, concept, EOS...] and [BOS, slots, concept, EOS...], (K, L, d).
      concept_emb: theta0's encodings of `plain`, K rows.
      retained: token embeddings of the prompts to retain, (R, L, d). retained_emb: theta0's encodings, R rows.
    """

    net: Networks
    plain: jax.Array
    template: jax.Array
    concept_emb: Conditioning
    retained: jax.Array
    retained_emb: Conditioning


def check_fit(pipeline, concepts: list[str], config: AdvUnlearnConfig) -> None:
    """Raises `AegisError` for texts that `setup` would refuse."""
    if len(concepts) > config.steps:
        raise AegisError(f"steps={config.steps} for {len(concepts)} concepts, one in each step; take more steps")
    for concept in concepts:
        concept_tokens(pipeline.tokenizer, concept, config.attack.tokens)
    _retained(pipeline.tokenizer, concepts, config)


def _retained(tokenizer, concepts: list[str], config: AdvUnlearnConfig) -> list[str]:
    """The prompts to retain. Raises `AegisError` for too few of them, and for one that cannot be encoded whole."""
    given = list(config.retain.prompts)
    named = [naming(concept) for concept in concepts]
    neutral = [text for text in known(tokenizer, NEUTRAL, concepts) if not any(each.search(text) for each in named)]
    prompts = given or neutral
    if len(prompts) < config.retain.batch:
        of = "" if given else " of the neutral set known to this tokenizer; name your own"
        raise AegisError(f"retain.prompts: {len(prompts)}{of}, fewer than retain.batch={config.retain.batch}")
    room = tokenizer.model_max_length - 2
    for prompt in prompts:
        if len(tokenizer.tokens(prompt)) > room:
            raise AegisError(f"retain.prompts: {prompt[:40]!r} has more than {room} tokens; shorten it")
    for concept, each in zip(concepts, named):
        for prompt in filter(each.search, prompts):
            raise AegisError(f"retain.prompts: {prompt[:40]!r} names {concept!r}, which is to be erased; leave it out")
    return prompts


def setup(pipeline, concepts, config: AdvUnlearnConfig, placement=None) -> tuple[State, Frozen]:
    """The state at step 0 and the frozen side. Raises `AegisError` as `check`, `check_fit` and `networks` do."""
    check(config)
    refuse_mesh(config, placement)
    concepts = [concepts] if isinstance(concepts, str) else list(concepts)
    if not concepts:
        raise AegisError("no concept given; name at least one, such as 'star'")
    check_fit(pipeline, concepts, config)
    net = networks(pipeline, config.trainable, config.compute_dtype, config.latents.steps)
    tokenizer, k = pipeline.tokenizer, config.attack.tokens

    def embedded(texts, slots=0):
        rows = [padded(tokenizer, [None] * slots + list(tokenizer.tokens(text))).ids for text in texts]
        return embed_ids(net.text_graph, net.text, np.stack(rows))

    plain, retained = embedded(concepts), embedded(_retained(tokenizer, concepts, config))
    frozen = Frozen(
        net=net,
        plain=plain,
        template=embedded(concepts, k),
        concept_emb=encode_rows(net.text_graph, net.text, plain),
        retained=retained,
        retained_emb=encode_rows(net.text_graph, net.text, retained),
    )
    return _first_state(frozen, config), frozen


def _first_state(frozen: Frozen, config: AdvUnlearnConfig) -> State:
    net, concepts = frozen.net, len(frozen.plain)
    drift = trainable.zero_drift(trained(net, config.trainable), config.trainable)
    if not drift:
        raise AegisError(f"trainable={config.trainable!r} selects no tensor of this model; choose full")
    key = jax.random.fold_in(jax.random.key(config.seed), SETUP)
    pool = partial(latents.empty_pool, net, steps=config.latents.steps)
    sizes = {"erase": concepts, "retain": len(frozen.retained)}
    pools = {name: pool(size, latents.TRAJECTORIES) for name, size in sizes.items() if uses_pool(config, size)}
    return State(
        step=jnp.int32(0),
        drift=drift,
        opt_state=adam.init(drift, jnp.bfloat16 if config.low_memory else jnp.float32),
        p=random_words(net.text_graph, net.text, net.word_ids, key, (concepts, config.attack.tokens)),
        latents=pools,
    )


def uses_pool(config: AdvUnlearnConfig, size: int) -> bool:
    """Whether latents of so many prompts come from a pool of trajectories."""
    return config.latents.refresh_every > 1 and size <= latents.MOST_CONCEPTS
