"""From a pipeline, concepts and a config to AGE's first state, and what it never changes.

Shapes: K concepts, C words to choose from, L tokens, D text width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import PROMPTS_PER_CALL, Conditioning, encode, join
from aegis_jax.diffusion.template import padded
from aegis_jax.erasure import adam, latents, trainable
from aegis_jax.erasure.age.candidates import chosen
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


@pytree(data="net concept_emb candidates counts")
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a run reads and never changes.

    Attributes:
      net: theta0's networks. concept_emb: c_e, K rows.
      candidates: theta0's encodings of the words to choose from, (K, C, L, D), of which the first `counts` (K,) count.
    """

    net: Networks
    concept_emb: Conditioning
    candidates: jax.Array
    counts: jax.Array


def check_fit(pipeline, concepts: list[str], config: AgeConfig) -> None:
    """Raises `AegisError` for texts that `setup` would refuse."""
    tokenizer, given = pipeline.tokenizer, config.target.words
    if len(concepts) > config.steps:
        raise AegisError(f"steps={config.steps} for {len(concepts)} concepts, one in each step; take more steps")
    for concept in concepts:
        concept_tokens(tokenizer, concept)
    if len(set(given)) == 1:
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
    concept_emb = encode(with_text_in_float32(pipeline), concepts)
    frozen = Frozen(net, concept_emb, *_candidates(net, pipeline.tokenizer, concepts, config))
    return _first_state(frozen, config), frozen


def _candidates(net: Networks, tokenizer, concepts: list[str], config: AgeConfig) -> tuple[jax.Array, jax.Array]:
    """(encodings (K, C, L, D), how many of each concept's count (K,)): filled up to one shape with the first."""
    each = chosen(net, tokenizer, concepts, config.target, config.seed)
    most, parts = max(map(len, each)), []
    for mine in each:
        ids = np.stack([padded(tokenizer, list(tokens)).ids for tokens in mine])
        ids = ids[np.where(np.arange(most) < len(mine), np.arange(most), 0)]
        rows = [
            embed_ids(net.text_graph, net.text, ids[i : i + PROMPTS_PER_CALL]) for i in range(0, most, PROMPTS_PER_CALL)
        ]
        parts.append(join(*(encode_rows(net.text_graph, net.text, some) for some in rows)).embedding)
    return jnp.stack(parts), jnp.asarray([len(mine) for mine in each], jnp.int32)


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
