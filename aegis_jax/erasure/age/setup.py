"""From a pipeline, concepts and a config to AGE's first state, and what it never changes.

Shapes: K concepts, C words to choose from, L tokens, D text width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import Conditioning, encode
from aegis_jax.diffusion.template import padded
from aegis_jax.erasure import adam, latents, trainable
from aegis_jax.erasure.aegis import words
from aegis_jax.erasure.age.config import AgeConfig, check
from aegis_jax.erasure.networks import Networks, embed_ids, encode_rows, networks, refuse_mesh, with_text_in_float32
from aegis_jax.erasure.programs import pytree
from aegis_jax.erasure.texts import concept_tokens, naming
from aegis_jax.errors import AegisError


@pytree(data="step drift opt_state pi moments latents")
@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from step to step.

    Attributes:
      step: int32 scalar, steps done.
      drift: theta - theta0 of the trained tensors, float32, stacked (groups.py). opt_state: Adam's moments of it.
      pi: logits of the words that each concept may become, (K, C). moments: Adam's of it, {"mu", "nu"}.
      latents: {"erase": pool of trajectories of the concepts}; empty where draws are fresh.
    """

    step: jax.Array
    drift: dict
    opt_state: Any
    pi: jax.Array
    moments: dict
    latents: dict


@pytree(data="net concept_emb candidates")
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a run reads and never changes.

    Attributes:
      net: theta0's networks. concept_emb: c_e, K rows.
      candidates: theta0's encodings of the words to choose from, (K, C, L, D).
    """

    net: Networks
    concept_emb: Conditioning
    candidates: jax.Array


def check_fit(pipeline, concepts: list[str], config: AgeConfig) -> None:
    """Raises `AegisError` for texts that `setup` would refuse."""
    tokenizer, given = pipeline.tokenizer, config.target.words
    if len(concepts) > config.steps:
        raise AegisError(f"steps={config.steps} for {len(concepts)} concepts, one in each step; take more steps")
    for concept in concepts:
        concept_tokens(tokenizer, concept)
    if len(given) == 1:
        raise AegisError("target.words: one, and there is nothing to choose; name several")
    for text in given:
        if not tokenizer.tokens(text) or len(tokenizer.tokens(text)) > tokenizer.model_max_length - 2:
            raise AegisError(f"target.words: {text[:40]!r} has no tokens or too many; choose another wording")
        for concept in filter(lambda concept: naming(concept).search(text), concepts):  # noqa: B023
            raise AegisError(f"target.words: {text[:40]!r} names {concept!r}, which is to be erased; leave it out")


def setup(pipeline, concepts, config: AgeConfig, placement=None) -> tuple[State, Frozen]:
    """The state at step 0 and the frozen side. Raises `AegisError` as `check`, `check_fit` and `networks` do."""
    check(config)
    refuse_mesh(config, placement)
    concepts = [concepts] if isinstance(concepts, str) else list(concepts)
    if not concepts:
        raise AegisError("no concept given; name at least one, such as 'star'")
    check_fit(pipeline, concepts, config)
    net = networks(pipeline, config.trainable, config.compute_dtype, config.latents.steps)
    frozen = Frozen(
        net, encode(with_text_in_float32(pipeline), concepts), _candidates(net, pipeline.tokenizer, concepts, config)
    )
    return _first_state(frozen, config), frozen


def _candidates(net: Networks, tokenizer, concepts: list[str], config: AgeConfig) -> jax.Array:
    given = config.target.words
    if given:
        chosen = [[tokenizer.tokens(text) for text in given]] * len(concepts)
    else:
        args = tokenizer, net.text_graph, net.text
        known = words.vocabularies(*args, [[concept] for concept in concepts], config.seed)
        ids = [np.asarray(each.words[: int(each.size)]) for each in known]
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(net.text)):  # `jax.eval_shape` asks for shapes
            chosen = [[[i] for i in np.resize(mine, min(len(mine), config.target.centres))] for mine in ids]
        else:
            chosen = [_chosen(args, concept, mine, config) for concept, mine in zip(concepts, ids)]
    # As many of each concept: the nearest come first.
    fewest = min(map(len, chosen))
    rows = [padded(tokenizer, list(tokens)).ids for mine in chosen for tokens in mine[:fewest]]
    embedded = [
        encode_rows(net.text_graph, net.text, embed_ids(net.text_graph, net.text, np.stack(rows[i : i + fewest])))
        for i in range(0, len(rows), fewest)
    ]
    return jnp.stack([cond.embedding for cond in embedded])


def _chosen(args, concept: str, ids: np.ndarray, config: AgeConfig) -> list[list[int]]:
    """Tokens of the words that the concept may become, nearest first: of its nearest by Euclidean distance of the text
    encodings at the end-of-text token, those nearest to the centres of clusters."""
    from scipy.cluster.vq import kmeans2

    target, tokenizer = config.target, args[0]
    length = tokenizer.model_max_length
    states = words.encodings(*args, [[i] for i in ids], 3)
    own = words.encodings(*args, [tokenizer.tokens(concept)], length)
    order = np.argsort(np.linalg.norm(states - own, axis=1), kind="stable")[: target.nearest]
    if len(order) > target.centres:
        centres, _ = kmeans2(states[order].astype(np.float64), target.centres, minit="++", seed=config.seed)
        distances = np.linalg.norm(states[order][:, None] - centres, axis=-1)
        order = order[np.unique(distances.argmin(0))]
    return [[int(i)] for i in ids[order]]


def _first_state(frozen: Frozen, config: AgeConfig) -> State:
    drift = trainable.zero_drift(frozen.net.unet, config.trainable)
    if not drift:
        raise AegisError(f"trainable={config.trainable!r} selects no tensor of this UNet; choose full")
    pi = jnp.zeros(frozen.candidates.shape[:2], jnp.float32)
    pools = {}
    if uses_pool(config, len(pi)):
        pools["erase"] = latents.empty_pool(frozen.net, len(pi), latents.TRAJECTORIES, config.latents.steps)
    return State(
        step=jnp.int32(0),
        drift=drift,
        opt_state=adam.init(drift, jnp.bfloat16 if config.low_memory else jnp.float32),
        pi=pi,
        moments={"mu": jnp.zeros_like(pi), "nu": jnp.zeros_like(pi)},
        latents=pools,
    )


def uses_pool(config: AgeConfig, concepts: int) -> bool:
    """Whether the concepts' latents come from a pool of trajectories."""
    return config.latents.refresh_every > 1 and concepts <= latents.MOST_CONCEPTS
