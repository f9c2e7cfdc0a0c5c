"""One step of STEREO (Srivatsan et al., CVPR 2025, arXiv 2408.16807), which is a step of one of its phases.

Stage 1, search: in every round r the current concept c_r is erased, and then found again.
  erase    theta towards e(c_0) - eta (e(c_r) - e(c_0)) under c_r, e of the weights that the round began with
  invert   a token s_r such that E(a text with s_r) draws the concept: denoising loss on pictures of it; c_r+1 := s_r
Stage 2, once: from the original weights theta0, under a prompt c of the concept and all tokens,
  L_e = ||eps(theta, z, t, c) - [e0(c_0) + a (e0(c_a) - e0(c_0)) - n mean_j (e0(c_j) - e0(c_0))]||^2

with an anchor c_a, the concept among other things, and all c_j, the concept and the tokens. Prompts and anchors take
turns in shuffled passes. Latents are drawn by the current weights under c, t lies above their level (latents.LEVELS).

Shapes: B latents, R rounds, J = R + 1 prompts, k vectors of a token, L tokens, d token-embedding width.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.conditioning import Conditioning, join, per_latent
from aegis_jax.diffusion.schedule import noised
from aegis_jax.diffusion.template import fill
from aegis_jax.erasure import adam, latents, networks
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.networks import Networks, encoded, noise
from aegis_jax.erasure.programs import given, program
from aegis_jax.erasure.stereo.config import StereoConfig
from aegis_jax.erasure.stereo.setup import Frozen, State

ERASE, INVERT, ONCE = range(3)
_square = lambda x: jnp.mean(jnp.square(x))  # noqa: E731
_mean = jax.jit(lambda x: jnp.mean(x.astype(jnp.float32)))
_average = jax.jit(lambda losses: jnp.mean(jnp.stack(losses)))
_zeros = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree))
_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
_size = jax.jit(lambda drift: jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in drift.values())))
_rows = jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree))
_at = jax.jit(lambda rows, i: rows[i], static_argnums=1)
_put = jax.jit(lambda rows, i, new: rows.at[i].set(new), static_argnums=1)


class Phase(NamedTuple):
    """Which phase a step is of: its kind, the round, and how many of its steps were done before."""

    kind: int
    round: int
    position: int


def phase_of(config: StereoConfig, number: int) -> Phase:
    """Of the step that follows `number` steps. All phases have as many; what is left over goes to the last."""
    each, rounds = config.steps // config.phases, config.search.rounds
    if number >= 2 * rounds * each:
        return Phase(ONCE, rounds, number - 2 * rounds * each)
    index, position = divmod(number, each)
    return Phase((ERASE, INVERT)[index % 2], index // 2, position)


@partial(jax.jit, static_argnums=2)
def _keys(seed, step, inversions: int):
    """(of the latents, of every step of an inversion)."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, 0), [jax.random.fold_in(key, 1 + i) for i in range(inversions)]


@partial(jax.jit, static_argnums=(2, 3))
def _turn(seed, position, count: int, salt: int):
    """(which of `count` has its turn, (1,); how many it has had before, (1,)): passes in a new order each."""
    turn = position // count
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), (1 << 31) + salt), turn)
    return jax.random.permutation(key, jnp.arange(count, dtype=jnp.int32))[position % count][None], turn[None]


@program
def prompts(net0: Networks, plain, template, soft) -> Conditioning:
    """The concept and all tokens, encoded: J rows."""
    filled = jnp.broadcast_to(template, (len(soft), *template.shape[1:])).at[:, 1 : 1 + soft.shape[1]].set(soft)
    return encoded(net0, jnp.concatenate([plain, filled]))


@program
def search_goal(teacher: Networks, at: Noised, cond: Conditioning, eta):
    """What theta shall predict for the prompt `cond` (1 row) while it is erased, (B, h, w, C)."""
    count = len(at.z)
    both = join(per_latent(cond, count), per_latent(teacher.empty_emb, count))
    twice = Noised(*(jnp.concatenate([x, x]) for x in (at.z, at.t)))
    eps, empty = jnp.split(noise(teacher, twice, both), 2)
    return empty - eta * (eps - empty)


@program
def once_goal(net0: Networks, at: Noised, conds: Conditioning, anchor: Conditioning, weights):
    """The goal of stage 2 for the J prompts `conds` and an anchor (1 row), (B, h, w, C). weights: (a, n)."""
    count, J = len(at.z), len(conds.embedding)
    rows = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), join(conds, anchor, net0.empty_emb))
    many = Noised(*(jnp.concatenate([x] * (J + 2)) for x in (at.z, at.t)))
    eps = noise(net0, many, rows).reshape(J + 2, *at.z.shape)
    empty = eps[J + 1]
    return empty + weights[0] * (eps[J] - empty) - weights[1] * (eps[:J].mean(0) - empty)


def gradients_of(net: Networks, at: Noised, cond: Conditioning, goal, trainable_set: str, remat: bool):
    """({"L_e"} of the networks `net`, its gradient by the trained tensors, by group). cond: 1 row."""

    def loss(now: Networks):
        L_e = _square(noise(now, at, cond, remat=remat) - goal)
        return L_e, {"L_e": L_e}

    return networks.gradients(net, trainable_set, loss)


@program(static_argnames=("trainable_set", "remat"), donate_argnames=("drift", "opt_state"))
def _update(net, drift, opt_state, at, cond, goal, rate, *, trainable_set: str, remat: bool):
    losses, gradients = gradients_of(net, at, cond, goal, trainable_set, remat)
    drift, opt_state, size = adam.descended(drift, opt_state, gradients, rate)
    return drift, opt_state, losses | {"drift_norm": size}


def inversion_loss(net: Networks, frozen: Frozen, soft, drawn, *, remat: bool = False):
    """The denoising loss of a token (k, d). drawn: (picture (B,), text (B,), t (B,), noise (B, h, w, C))."""
    picture, text, t, wanted = drawn
    tokens = fill(frozen.texts[text], frozen.slots[text], jnp.broadcast_to(soft, (len(t), *soft.shape)))
    at = Noised(noised(net.schedule, frozen.z_0[picture], t, wanted), t)
    return _square(noise(net, at, encoded(net, tokens), remat=remat) - wanted)


@program(static_argnames=("batch", "share", "remat"))
def _invert(net, frozen, soft, moments, key, first, rate, *, batch: int, share: int, remat: bool):
    """One step of AdamW on a token: (token, moments, loss before). Of the pictures `share` count, from `first` on."""
    key_p, key_x, key_t, key_n = jax.random.split(key, 4)
    drawn = (
        first + jax.random.randint(key_p, (batch,), 0, share, jnp.int32),
        jax.random.randint(key_x, (batch,), 0, len(frozen.texts), jnp.int32),
        # Not the last: as published.
        jax.random.randint(key_t, (batch,), 0, len(net.schedule.alphas_cumprod) - 1, jnp.int32),
        jax.random.normal(key_n, (batch, *net.latent_shape), jnp.float32),
    )
    loss, gradient = jax.value_and_grad(lambda x: inversion_loss(net, frozen, x, drawn, remat=remat))(soft)
    direction, moments = adam.update({"soft": gradient}, moments)
    return soft - rate[0] * (direction["soft"] + rate[1] * soft), moments, loss


def erase_step(state: State, frozen: Frozen, config: StereoConfig) -> tuple[State, dict]:
    """One training step: (new state, metrics). The old state's buffers are donated: do not reuse it.

    Metrics, float32 scalars: L_e (of an inversion its denoising loss), phase (0 erase, 1 invert, 2 once), drift_norm;
    but in an inversion t (mean).
    """
    if isinstance(state.step, jax.core.Tracer):  # asked for shapes, or for the programs: those of all phases
        for kind in (ERASE, INVERT, ONCE):
            state, metrics = _step(state, frozen, config, Phase(kind, 0, 0))
        return state, metrics
    return _step(state, frozen, config, phase_of(config, int(jax.device_get(state.step))))


def _step(state: State, frozen: Frozen, config: StereoConfig, phase: Phase) -> tuple[State, dict]:
    if phase.position == 0:
        state = _begun(state, frozen, phase)
    seed = given(config.seed, jnp.uint32)
    key, keys = _keys(seed, state.step, config.inversion.steps)
    net = networks.moved(frozen.net, state.drift, config.trainable)
    if phase.kind == INVERT:
        state, metrics = _inverted(state, frozen, net, keys, phase, config)
    else:
        state, metrics = _erased(state, frozen, net, key, seed, phase, config)
    return dataclasses.replace(state, step=_next(state.step)), metrics | {"phase": given(phase.kind)}


_next = jax.jit(lambda step: step + 1)


def _begun(state: State, frozen: Frozen, phase: Phase) -> State:
    """The state as a phase begins with it."""
    if phase.kind == INVERT:
        moments = _zeros(state.moments)
        return dataclasses.replace(state, soft=_put(state.soft, phase.round, frozen.initial), moments=moments)
    if phase.kind == ERASE:
        return dataclasses.replace(state, opt_state=_zeros(state.opt_state), teacher=_copy(state.drift))
    zeros, pools = _zeros(state.drift), state.latents
    pools = {name: latents.Pool(pool.z, _zeros(pool.drawn)) for name, pool in pools.items()}  # of other weights
    return dataclasses.replace(
        state, drift=zeros, teacher=_zeros(state.teacher), opt_state=_zeros(state.opt_state), latents=pools
    )


def _erased(state: State, frozen: Frozen, net: Networks, key, seed, phase: Phase, config: StereoConfig):
    """A step of Adam on theta, of stage 1 or of stage 2."""
    position = given(phase.position, jnp.int32)
    conds = prompts(frozen.net, frozen.plain, frozen.template, state.soft)
    if phase.kind == ERASE:
        number, visits, rate = given([phase.round], jnp.int32), given([phase.position], jnp.int32), config.search.rate
    else:
        number, visits = _turn(seed, position, config.search.rounds + 1, 0)
        rate = config.once.rate
    cond = _rows(conds, number)
    at, pools = _drawn(net, state.latents, cond, (number, visits), key, config)
    if phase.kind == ERASE:
        teacher = networks.moved(frozen.net, state.teacher, config.trainable)
        goal = search_goal(teacher, at, cond, given(config.search.eta))
    else:
        anchor = _rows(frozen.anchors, _turn(seed, position, len(frozen.anchors.embedding), 1)[0])
        goal = once_goal(frozen.net, at, conds, anchor, given([config.once.anchor, config.once.negative]))
    drift, opt_state, found = _update(
        net, state.drift, state.opt_state, at, cond, goal, given(rate * config.learning_rate),
        trainable_set=config.trainable, remat=config.low_memory,
    )  # fmt: skip
    state = dataclasses.replace(state, drift=drift, opt_state=opt_state, latents=pools)
    return state, found | {"t": _mean(at.t)}


def _drawn(net: Networks, pools: dict, cond: Conditioning, turn: tuple, key, config: StereoConfig):
    """(`Noised` of the step's batch under `cond`, pools)."""
    how = {"batch": config.batch, "levels": "above"}
    if not pools:
        return latents.fresh(net, net.unet, cond, key, steps=config.latents.steps, **how)[0], pools
    how["refresh_every"] = config.latents.refresh_every
    at, _, pool = latents.pooled(net, net.unet, pools["erase"], cond, *turn, key, **how)
    return at, {"erase": pool}


def _inverted(state: State, frozen: Frozen, net: Networks, keys, phase: Phase, config: StereoConfig):
    """Some steps of AdamW on the round's token, by its own share of the pictures."""
    inversion, soft, moments, losses = config.inversion, _at(state.soft, phase.round), state.moments, []
    share = inversion.pictures // config.search.rounds
    first, rate = given(phase.round * share, jnp.int32), given([inversion.learning_rate, inversion.weight_decay])
    how = {"batch": config.batch, "share": share, "remat": config.low_memory}
    for key in keys:
        soft, moments, loss = _invert(net, frozen, soft, moments, key, first, rate, **how)
        losses.append(loss)
    state = dataclasses.replace(state, soft=_put(state.soft, phase.round, soft), moments=moments)
    return state, {"L_e": _average(losses), "drift_norm": _size(state.drift)}
