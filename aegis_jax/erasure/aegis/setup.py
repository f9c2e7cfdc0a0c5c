"""From a pipeline, concepts and a config to the first state of a run."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import encode
from aegis_jax.diffusion.template import padded
from aegis_jax.erasure import adam, groups, latents, trainable
from aegis_jax.erasure.aegis import near, rectify, shown, soft, words
from aegis_jax.erasure.aegis.config import EraseConfig, check, check_concepts
from aegis_jax.erasure.aegis.state import Frozen, State
from aegis_jax.erasure.closed.room import METHODS
from aegis_jax.erasure.networks import SETUP, embed_ids, networks
from aegis_jax.erasure.texts import concept_tokens
from aegis_jax.errors import AegisError


def freeze(pipeline, concepts: list[str], config: EraseConfig, placement=None, *, slots=None) -> Frozen:
    """`freeze_each` of a single run."""
    return freeze_each(pipeline, [concepts], config, placement, slots=slots)[0]


def freeze_each(pipeline, runs: list[list[str]], config: EraseConfig, placement=None, *, slots=None) -> list[Frozen]:
    """The frozen side of an erasure from a pipeline for each run's concepts; what is not theirs is one array in all.

    slots: soft tokens of the target and of the adversarial prompt, by default the config's for both.
    Raises `AegisError` for an empty concept, one that does not fit the tokenizer, or an inpainting-like UNet.
    """
    tokenizer, slots = pipeline.tokenizer, slots or (_slots(config), _slots(config))
    tokens = [[concept_tokens(tokenizer, concept, max(slots)) for concept in concepts] for concepts in runs]
    net = networks(pipeline, config.trainable, config.compute_dtype, config.latents.steps, placement)
    in_float32 = dataclasses.replace(pipeline, text_encoder=dataclasses.replace(pipeline.text_encoder, params=net.text))

    def templates(count):
        rows = [padded(tokenizer, [None] * count + ids).ids for own in tokens for ids in own]
        return _dealt(embed_ids(net.text_graph, net.text, np.stack(rows)), runs)

    # All runs' concepts in one call each.
    owns = {
        "concept_emb": _dealt(encode(in_float32, [concept for concepts in runs for concept in concepts]), runs),
        "target_template": templates(slots[0]),
        "prompt_template": templates(slots[1]),
        "vocabulary": [None] * len(runs),
    }
    if config.draws_words:
        owns["vocabulary"] = words.vocabularies(tokenizer, net.text_graph, net.text, runs, config.seed)
        if config.words.near:
            precise = dataclasses.replace(
                net, unet=jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), pipeline.unet.params)
            )
            how = {"seed": config.seed, "batch": config.batch}
            owns["vocabulary"] = near.with_drawn(precise, owns["vocabulary"], owns["concept_emb"], config.words, **how)
    place = (lambda tree: tree) if placement is None else placement.place
    first, *others = [dict(zip(owns, each)) for each in zip(*owns.values())]
    frozen = Frozen(**vars(net), **first)
    frozen = place(frozen)
    return [frozen, *(dataclasses.replace(frozen, **place(each)) for each in others)]


def _dealt(rows, runs: list[list[str]]) -> list:
    """The rows of all runs' concepts, one after another, as those of each run: arrays of its own."""
    host, ends = jax.device_get(rows), np.cumsum([len(concepts) for concepts in runs])
    return [jax.device_put(jax.tree.map(lambda x: x[i:j], host)) for i, j in zip([0, *ends], ends)]  # noqa: B023


def check_fit(pipeline, concepts: list[str], config: EraseConfig) -> None:
    """Raises `AegisError` for concepts that `setup` would refuse: by their texts and number."""
    check_concepts(config, len(concepts))
    for concept in concepts:
        concept_tokens(pipeline.tokenizer, concept, _slots(config))


def _slots(config: EraseConfig) -> int:
    """Positions that a concept's prompts have for soft tokens, or for the words that it stands among."""
    return config.soft.tokens if config.soft.use != "none" else int(config.words.context != "none")


def setup(pipeline, concepts: str | list[str], config: EraseConfig, placement=None) -> tuple[State, Frozen]:
    """The state at step 0 and the frozen side.

    `placement` (parallel.mesh.Placement) spreads both over a mesh; None keeps them on the default device.
    Raises `AegisError` as `freeze`, `config.check` and `config.check_concepts` do.
    """
    return setup_each(pipeline, [concepts], config, placement)[0]


def setup_each(pipeline, runs: list, config: EraseConfig, placement=None) -> list[tuple[State, Frozen]]:
    """The same for several runs, of as many concepts each; what is not the concepts' own is one array in all of them.

    That holds for the first state too, but for the drift of `config.start`: no concept has had a part in it. It serves
    one run, or their copies (`erasure.lanes.stack`).
    """
    runs = [[concepts] if isinstance(concepts, str) else list(concepts) for concepts in runs]
    if not runs or not all(runs):
        raise AegisError("no concept given; name at least one, such as 'star'")
    count = len(runs[0])
    if any(len(concepts) != count for concepts in runs):
        raise AegisError(
            f"runs of {', '.join(sorted({str(len(c)) for c in runs}))} concepts cannot be set up together; give each "
            "as many"
        )
    check(config)
    check_concepts(config, count)
    if placement is not None:
        if config.start:
            raise AegisError(f"method={config.method} starts on the host: leave mesh.data and mesh.fsdp at 1")
        placement.check_batch(config.batch)
    frozen = freeze_each(pipeline, runs, config, placement)
    state = _first_state(frozen[0], count, config)
    if not config.start:
        return [(state, each) for each in frozen]
    return [
        (dataclasses.replace(state, drift=_started(pipeline, concepts, state.drift, config)), each)
        for concepts, each in zip(runs, frozen)
    ]


def _started(pipeline, concepts: list[str], drift: dict, config: EraseConfig) -> dict:
    """The drift, all 0, with what the closed form `config.start` changes for these concepts."""
    like, closed = trainable.select(pipeline.unet.params, config.trainable), METHODS[config.start]
    if any(isinstance(x, jax.core.Tracer) for x in like.values()):  # `jax.eval_shape` asks for shapes
        return drift
    _, solution = closed.start(pipeline, concepts, closed.settings)
    moves = {path: np.asarray(x) for path, x in solution.drift.items()}
    zero = lambda path: np.zeros(like[path].shape, np.float32)  # noqa: E731
    # The others, which may be as large as the model, stay as they are.
    touched = {name: paths for name, paths in groups.groups(like).items() if not moves.keys().isdisjoint(paths)}
    return drift | {
        name: jnp.asarray(np.stack([moves[path] if path in moves else zero(path) for path in paths]))
        for name, paths in touched.items()
    }


def _first_state(frozen: Frozen, concepts: int, config: EraseConfig) -> State:
    placement = frozen.placement
    zeros = partial(_zeros, placement)
    drift = zeros(jax.eval_shape(lambda unet: trainable.zero_drift(unet, config.trainable), frozen.unet))
    if not drift:
        raise AegisError(f"trainable={config.trainable!r} selects no tensor of this UNet; choose full")
    key_v, key_p = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), SETUP))
    shape = concepts * config.soft.prefixes, config.soft.tokens
    moments = jnp.bfloat16 if config.low_memory else jnp.float32
    state = State(
        step=jnp.int32(0),
        drift=drift,
        opt_state=zeros(jax.eval_shape(lambda d: adam.init(d, moments), drift)),
        v=soft.drawn(frozen, key_v, shape),
        p=soft.drawn(frozen, key_p, shape),
        omega=rectify.per_tensor(drift, config.grp.omega),
        conflict=rectify.per_tensor(drift, 0.0),
        kappa=jnp.zeros(concepts, jnp.float32) if config.moves_kappa else None,
        latents={name: zeros(pool) for name, pool in _pools(frozen, concepts, config).items()},
    )
    return state if placement is None else placement.place(state)


def uses_pool(config: EraseConfig, concepts: int) -> bool:
    """Whether latents come from a pool of trajectories."""
    return config.latents.refresh_every > 1 and concepts <= latents.MOST_CONCEPTS


def _pools(frozen: Frozen, concepts: int, config: EraseConfig) -> dict:
    """Shapes of the pools that a run needs: for the sign steps' latents, for the loss's where it has its own, and for
    those in context where they have trajectories of their own."""
    each = config.steps * config.batch // concepts
    pool = jax.eval_shape(lambda: latents.empty_pool(frozen, concepts, each, config.latents.steps))
    pooled, shared = uses_pool(config, concepts), config.latents.shared
    wanted = {
        "attack": (pool, pooled and (config.moves_v or config.moves_p or shared)),
        "loss": (pool, pooled and not shared),
        "context": (jax.eval_shape(shown.empty, pool), config.words.context == "shown"),
    }
    return {name: shapes for name, (shapes, want) in wanted.items() if want}


def _zeros(placement, shapes):
    """Zeros made where they will lie: an optimiser state may be larger than one device."""
    make = lambda s: jnp.zeros(s.shape, s.dtype, device=placement and placement.sharding(s.shape))  # noqa: E731
    return jax.tree.map(make, shapes)
