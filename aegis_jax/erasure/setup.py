"""From a pipeline, concepts and a config to the first state of a run."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.sample import encode_text
from aegis_jax.diffusion.schedule import make_schedule
from aegis_jax.erasure import adam, latents, rectify, trainable, words
from aegis_jax.erasure.config import EraseConfig, check
from aegis_jax.erasure.state import Frozen, State
from aegis_jax.errors import AegisError
from aegis_jax.models import clip
from aegis_jax.models import unet as unet_lib
from aegis_jax.models.unet_config import native_size


def compute_dtype(config: EraseConfig):
    """The dtype that the UNets compute in."""
    if config.compute_dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.compute_dtype)


def _template_ids(tokenizer, slots: int, concept: list[int]) -> np.ndarray:
    """[BOS, slot x slots, concept, EOS, PAD...] (1, L); the slots hold EOS until soft tokens replace them."""
    length = tokenizer.model_max_length
    used = [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * slots + concept + [tokenizer.eos_token_id]
    return np.array([used + [tokenizer.pad_token_id] * (length - len(used))], np.int32)


def _concept_tokens(tokenizer, concept: str, slots: int) -> list[int]:
    if not isinstance(concept, str) or not concept.strip():
        raise AegisError(f"concept {concept!r} is empty; give the concept's name, such as 'star'")
    tokens = tokenizer.tokens(concept)
    if not tokens:
        raise AegisError(f"concept {concept!r} has no tokens in this tokenizer; choose another wording")
    room = tokenizer.model_max_length - 2 - slots
    if len(tokens) > room:
        raise AegisError(
            f"concept {concept[:40]!r} has {len(tokens)} tokens, but the text encoder has room for {room} besides "
            f"BOS, EOS and {slots} adversarial tokens; shorten it"
        )
    return tokens


def freeze(pipeline, concepts: list[str], config: EraseConfig, placement=None) -> Frozen:
    """The frozen side of an erasure of `concepts` from a pipeline.

    Raises `AegisError` for an empty concept, one that does not fit the tokenizer, or an inpainting-like UNet.
    """
    unet, text, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    size, channels = native_size(unet.config) or (64, 64), unet.config.get("in_channels", 4)
    if channels != unet.config.get("out_channels", 4):
        raise AegisError(
            f"unet/config.json: in_channels={channels} but out_channels={unet.config.get('out_channels', 4)}; only "
            "text-to-image UNets can be erased from"
        )
    _check_text_width(unet.config, text.params)
    tokens = [_concept_tokens(tokenizer, concept, config.prompt.tokens) for concept in concepts]
    if config.aet.tokens > tokenizer.model_max_length - 2:
        raise AegisError(f"aet.tokens={config.aet.tokens} do not fit a prompt of {tokenizer.model_max_length} tokens")
    embed = jax.jit(clip.embed, static_argnums=0)
    text_params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), text.params)
    in_float32 = dataclasses.replace(pipeline, text_encoder=dataclasses.replace(text, params=text_params))
    template = lambda slots, ids: embed(text.graph, text_params, _template_ids(tokenizer, slots, ids))  # noqa: E731
    dtype = compute_dtype(config)
    schedule = make_schedule(pipeline.scheduler)
    _check_grid(schedule.alphas_cumprod.shape[0], config.latents.steps)
    frozen = Frozen(
        unet=jax.tree.map(lambda x: jnp.asarray(x, dtype), unet.params),
        text=text_params,
        schedule=schedule,
        concept_emb=jnp.stack([encode_text(in_float32, [concept]) for concept in concepts]),
        empty_emb=encode_text(in_float32, [""]),
        target_template=template(config.aet.tokens, []),
        prompt_template=jnp.stack([template(config.prompt.tokens, ids) for ids in tokens]),
        vocabulary=words.vocabulary(tokenizer, text.graph, text_params, concepts, config.preserve.similar)
        if config.draws_words
        else None,
        unet_graph=unet.graph if placement is None else unet_lib.without_flash(unet.graph, unet.params),
        text_graph=text.graph,
        latent_shape=(*size, channels),
        placement=placement,
    )
    return frozen if placement is None else placement.place(frozen)


def _check_text_width(config: dict, text_params) -> None:
    wanted = config.get("cross_attention_dim", 1280)
    found = text_params["text_model"]["final_layer_norm"]["bias"].shape[0]
    if set([wanted] if isinstance(wanted, int) else wanted) != {found}:
        raise AegisError(
            f"unet/config.json: cross_attention_dim={wanted} but the text encoder's hidden_size is {found}; UNet and "
            "text encoder do not belong together"
        )


def _check_grid(train_timesteps: int, steps: int) -> None:
    stride = train_timesteps // steps
    if stride == 0 or 1 + stride * (steps - 1) >= train_timesteps:
        raise AegisError(
            f"latents.steps={steps} does not fit a schedule of {train_timesteps} timesteps; take fewer, such as 50"
        )


def setup(pipeline, concepts: str | list[str], config: EraseConfig, placement=None) -> tuple[State, Frozen]:
    """The state at step 0 and the frozen side.

    `placement` (parallel.mesh.Placement) spreads both over a mesh; None keeps them on the default device.
    Raises `AegisError` as `freeze` and `config.check` do.
    """
    concepts = [concepts] if isinstance(concepts, str) else list(concepts)
    if not concepts:
        raise AegisError("no concept given; name at least one, such as 'star'")
    check(config)
    frozen = freeze(pipeline, concepts, config, placement)
    zeros = partial(_zeros, placement)
    drift = zeros(jax.eval_shape(lambda unet: trainable.zero_drift(unet, config.trainable), frozen.unet))
    if not drift:
        raise AegisError(f"trainable={config.trainable!r} selects no tensor of this UNet; choose full")
    # A step's keys are folds 0, 1, 2, ... of the seed; the largest fold is the setup's.
    key_v, key_p, key_z = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1), 3)
    grp, prompts = config.grp, concepts * config.prompt.prefixes
    state = State(
        step=jnp.int32(0),
        drift=drift,
        opt_state=zeros(jax.eval_shape(lambda d: adam.init(d, jnp.dtype(config.moments_dtype)), drift)),
        v=_soft_tokens(pipeline, key_v, prompts, config.aet.tokens, config.aet.init),
        p=_soft_tokens(pipeline, key_p, prompts, config.prompt.tokens, config.prompt.init),
        omega=rectify.first_omega(drift, grp),
        previous=zeros(jax.eval_shape(partial(rectify.projection, grp=grp), drift, drift))
        if grp.retention == "grp" and grp.omega_rule == "hypergradient"
        else None,
        kappa=jnp.zeros(len(concepts), jnp.float32) if config.moves_kappa else None,
        latents=None
        if config.latents.refresh_every == 1
        else latents.fill(frozen, frozen.unet, key_z, config=config.latents),
    )
    return (state if placement is None else placement.place(state)), frozen


def _zeros(placement, shapes):
    """Zeros made where they will lie: an optimiser state may be larger than one device."""
    make = lambda s: jnp.zeros(s.shape, s.dtype, device=placement and placement.sharding(s.shape))  # noqa: E731
    return jax.tree.map(make, shapes)


def random_tokens(pipeline, key, shape):
    """Embeddings of random whole words of the vocabulary, float32 (*shape, d): how soft tokens start.

    Pieces of words are left out: in a small vocabulary most of them were never trained.
    """
    all_words = _embeddings(pipeline, pipeline.tokenizer.word_ids)
    return all_words[jax.random.randint(key, (math.prod(shape),), 0, len(all_words))].reshape(*shape, -1)


def _soft_tokens(pipeline, key, concepts: list[str], tokens: int, init: str):
    """Where the soft tokens of each concept start, float32 (len(concepts), tokens, d)."""
    if init == "random":
        return random_tokens(pipeline, key, (len(concepts), tokens))
    if init == "mean":
        # A word that says nothing: in a small vocabulary a random word names something that is to be kept.
        starts = [pipeline.tokenizer.word_ids] * len(concepts)
    else:
        starts = [pipeline.tokenizer.tokens(concept) for concept in concepts]
    mean = jnp.stack([_embeddings(pipeline, ids).mean(0) for ids in starts])
    return jnp.repeat(mean[:, None], tokens, axis=1)


def _embeddings(pipeline, ids):
    """Of token ids, float32 (tokens, d)."""
    text = pipeline.text_encoder
    return clip.embed(text.graph, text.params, jnp.asarray(ids)[None])[0].astype(jnp.float32)


def merged_params(pipeline, drift: dict, trainable_set: str) -> dict:
    """theta0 + d on the pipeline's own parameters: trainable tensors float32, the others as they are."""
    return trainable.add_drift(pipeline.unet.params, drift, trainable_set, jnp.float32)
