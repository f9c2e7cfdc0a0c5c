"""From a pipeline, a concept and a config to STEREO's first state, and what it never changes.

Shapes: R rounds, A anchors, T texts, G pictures, L tokens, k vectors of a token, d token-embedding width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import Conditioning, per_latent
from aegis_jax.diffusion.sample import LATENT_PIXELS_PER_CALL, MOST_IMAGES_PER_CALL, sample_latents
from aegis_jax.diffusion.template import around, padded
from aegis_jax.erasure import adam, latents, trainable
from aegis_jax.erasure.networks import SETUP, Networks, embed_ids, encode_rows, networks, refuse_mesh
from aegis_jax.erasure.programs import pytree
from aegis_jax.erasure.stereo.config import TEXTS, StereoConfig, check
from aegis_jax.erasure.texts import concept_tokens, known
from aegis_jax.errors import AegisError

# The default anchors: the concept in plain company. Published are dozens of sentences for each of three concepts.
ANCHORS = (
    *("{} on a background", "{} in a forest", "{} by the sea", "{} in a city", "{} in a room", "{} at night"),
    *("a red {}", "a blue {}", "a green {}", "a yellow {}", "a purple {}", "a striped {}", "a dotted {}"),
)


@pytree(data="step drift opt_state teacher soft moments latents")
@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from step to step.

    Attributes:
      step: int32 scalar, steps done.
      drift: theta - theta0 of the trained tensors, float32, stacked (groups.py). opt_state: Adam's moments of it.
      teacher: the drift that the phase began with, whose predictions an erasure starts from; 0 in stage 2.
      soft: the tokens that were found, (R, k, d). moments: Adam's of the one that is being learnt.
      latents: {"erase": pool of trajectories of the concept and of every token}; empty where draws are fresh.
    """

    step: jax.Array
    drift: dict
    opt_state: Any
    teacher: dict
    soft: jax.Array
    moments: Any
    latents: dict


@pytree(data="net plain template anchors initial texts slots z_0")
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a run reads and never changes.

    Attributes:
      net: theta0's networks.
      plain, template: token embeddings of [BOS, concept, EOS...] and [BOS, token, EOS...], (1, L, d).
      anchors: theta0's encodings, A rows.
      initial: what a token starts as, (k, d). texts (T, L, d), slots (T, L): texts with a gap for it (template.py).
      z_0: latents of the pictures, (G, h, w, C).
    """

    net: Networks
    plain: jax.Array
    template: jax.Array
    anchors: Conditioning
    initial: jax.Array
    texts: jax.Array
    slots: jax.Array
    z_0: jax.Array


def check_fit(pipeline, concepts: list[str], config: StereoConfig) -> None:
    """Raises `AegisError` for texts that `setup` would refuse."""
    tokenizer, inversion = pipeline.tokenizer, config.inversion
    if len(concepts) != 1:
        raise AegisError(f"method={config.method} erases one concept, got {len(concepts)}; give each a run of its own")
    concept_tokens(tokenizer, concepts[0])
    if len(tokenizer.tokens(inversion.initial)) != 1:
        raise AegisError(f"inversion.initial={inversion.initial!r} is not one token of this tokenizer; take another")
    if inversion.prompt:
        concept_tokens(tokenizer, inversion.prompt)
    for text in config.once.anchors:
        if "{}" not in text:
            raise AegisError(f"once.anchors: {text[:40]!r} has no {{}}, the place of the concept")
    for text in _anchors(tokenizer, concepts[0], config):
        if len(tokenizer.tokens(text)) > tokenizer.model_max_length - 2:
            raise AegisError(f"once.anchors: {text[:40]!r} is too long for the text encoder; shorten it")
    for text in TEXTS[inversion.texts]:
        around(tokenizer, text, inversion.tokens)


def _anchors(tokenizer, concept: str, config: StereoConfig) -> list[str]:
    texts = list(config.once.anchors) or known(tokenizer, ANCHORS, [concept]) or ["{}"]
    return [text.replace("{}", concept) for text in texts]


def setup(pipeline, concepts, config: StereoConfig, placement=None) -> tuple[State, Frozen]:
    """The state at step 0 and the frozen side, pictures included.

    Raises `AegisError` as `check`, `check_fit` and `networks` do.
    """
    check(config)
    refuse_mesh(config, placement)
    concepts = [concepts] if isinstance(concepts, str) else list(concepts)
    check_fit(pipeline, concepts, config)
    net = networks(pipeline, config.trainable, config.compute_dtype, config.latents.steps)
    tokenizer, inversion = pipeline.tokenizer, config.inversion
    embed = lambda ids: embed_ids(net.text_graph, net.text, np.stack(ids))  # noqa: E731
    said = lambda text: padded(tokenizer, list(tokenizer.tokens(text))).ids  # noqa: E731
    texts = [around(tokenizer, text, inversion.tokens) for text in known(tokenizer, TEXTS[inversion.texts])]
    plain = embed([said(concepts[0])])
    drawn_by = embed([said(inversion.prompt)]) if inversion.prompt else plain
    frozen = Frozen(
        net=net,
        plain=plain,
        template=embed([padded(tokenizer, [None] * inversion.tokens).ids]),
        anchors=encode_rows(
            net.text_graph, net.text, embed([said(x) for x in _anchors(tokenizer, concepts[0], config)])
        ),
        initial=jnp.tile(embed([np.asarray(tokenizer.tokens(inversion.initial), np.int32)])[0], (inversion.tokens, 1)),
        texts=embed([text.ids for text in texts]),
        slots=jnp.asarray(np.stack([text.slots for text in texts])),
        z_0=_pictures(net, encode_rows(net.text_graph, net.text, drawn_by), config),
    )
    return _first_state(frozen, config), frozen


def _pictures(net: Networks, cond: Conditioning, config: StereoConfig) -> jax.Array:
    """Latents of the original model's pictures of a prompt, (G, h, w, C)."""
    count, key = config.inversion.pictures, jax.random.fold_in(jax.random.key(config.seed), SETUP)
    at_once = min(MOST_IMAGES_PER_CALL, max(1, LATENT_PIXELS_PER_CALL // (net.latent_shape[0] * net.latent_shape[1])))
    at_once = min(at_once, count)
    grid, parts = latents.timesteps(net, config.latents.steps), []
    for part in range(-(-count // at_once)):
        z_T = jax.random.normal(jax.random.fold_in(key, part), (at_once, *net.latent_shape), jnp.float32)
        rows = (per_latent(x, at_once) for x in (cond, net.empty_emb))
        guidance = config.inversion.guidance
        parts.append(sample_latents(net.unet_graph, net.unet, net.schedule, *rows, z_T, grid, guidance))
    return jnp.concatenate(parts)[:count]


def _first_state(frozen: Frozen, config: StereoConfig) -> State:
    net, rounds = frozen.net, config.search.rounds
    drift = trainable.zero_drift(net.unet, config.trainable)
    if not drift:
        raise AegisError(f"trainable={config.trainable!r} selects no tensor of this UNet; choose full")
    soft = jnp.tile(frozen.initial[None], (rounds, 1, 1))
    pools = {}
    if config.latents.refresh_every > 1:
        pools["erase"] = latents.empty_pool(net, rounds + 1, latents.TRAJECTORIES, config.latents.steps)
    return State(
        step=jnp.int32(0),
        drift=drift,
        opt_state=adam.init(drift, jnp.bfloat16 if config.low_memory else jnp.float32),
        teacher=jax.tree.map(jnp.zeros_like, drift),
        soft=soft,
        moments=adam.init({"soft": soft[0]}, jnp.float32),
        latents=pools,
    )
