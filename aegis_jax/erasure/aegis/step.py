"""One training step (docs/method.md), as a pure function made of a few compiled programs.

Read from the bottom: `erase_step` is the step that training runs; `moved_p`, `moved_v`, `goal_of` and `gradients_of`
are its parts, which `erasure.step.explicit_step` runs too, with every random draw given. The programs take their
weights as arguments, so frozen and current UNet share one compilation:

  latents.fresh / pooled   z_t and t, by guided sampling with the current weights, under c_e and under c'
  predicted                noise of theta0 and of theta
  soft.sign_step           v with theta0, p with theta
  shown.drawn              latents in context of trajectories of their own, if that is asked for
  context.in_context       the concept among random words instead, for half of the latents, likewise
  _update                  gradient of L_e (and L_p), GRP and Adam in one pass

Randomness is `fold_in(key(seed), step)` and named splits of it; no key is stored. What the host hands to a program it
hands over by name (`given`): a step passes under `jax.transfer_guard_host_to_device("disallow")`.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aegis_jax.diffusion import predict
from aegis_jax.diffusion.conditioning import Conditioning, join, per_latent
from aegis_jax.erasure import adam, groups, in_turn, latents, trainable
from aegis_jax.erasure.aegis import context, rectify, shown, soft, words
from aegis_jax.erasure.aegis.config import EraseConfig, GRPConfig
from aegis_jax.erasure.aegis.state import Frozen, Goal, State
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.programs import given, program
from aegis_jax.models.model import flatten, unflatten


class Turn(NamedTuple):
    """Whose turn it is: latents are dealt in turn to the prompts of all concepts, latent i of a batch to row i mod G.

    Attributes:
      prompts: rows of v and p, (G,). concepts: theirs, (G,).
      own: the batch's different concepts, (G',); visits: how many steps each of those has had before, (G',).
    """

    prompts: jax.Array
    concepts: jax.Array
    own: jax.Array
    visits: jax.Array


class Keys(NamedTuple):
    """A step's random keys by what they draw."""

    attack: jax.Array
    loss: jax.Array
    words: jax.Array
    v: jax.Array
    p: jax.Array


@jax.jit
def keys_of(seed, step) -> Keys:
    """The keys of a step, counted from 0, of a run of that seed."""
    return Keys(*jax.random.split(jax.random.fold_in(jax.random.key(seed), step), len(Keys._fields)))


@partial(jax.jit, static_argnames=("prompts", "concepts", "batch"))
def _turn(step, prompts: int, concepts: int, batch: int) -> Turn:
    # Each one's first latent, counted over the run.
    dealt = step * batch + jnp.arange(min(prompts, batch), dtype=jnp.int32)
    first = step * batch + jnp.arange(min(concepts, batch), dtype=jnp.int32)
    return Turn(dealt % prompts, dealt % concepts, first % concepts, jnp.minimum(first // concepts, step))


_rows = jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree))
_first = jax.jit(lambda tree, count: jax.tree.map(lambda x: x[:count], tree), static_argnums=1)
_put = jax.jit(lambda all_rows, rows, new: all_rows.at[rows].set(new))
_mean = jax.jit(lambda x: jnp.mean(x.astype(jnp.float32)))
_stack = jax.jit(lambda *arrays: jnp.stack(arrays))


@program(static_argnames="shares")
def predicted(frozen: Frozen, params, at: Noised, cond: Conditioning, *, shares: int = 1):
    """Predicted noise (B, h, w, C); of `shares` conditionings of B rows each, joined, (shares B, h, w, C)."""
    z, t = (jnp.concatenate([x] * shares) for x in (at.z, at.t))
    return predict.predict(frozen.unet_graph, params, frozen.schedule, z, t, cond)


_joined = jax.jit(lambda batch, *conds: join(*(per_latent(c, batch) for c in conds)), static_argnums=0)
_halves = jax.jit(lambda x: jnp.split(x, 2))


@jax.jit
def _towards(eta, eps_empty, eps_target):
    """What the target e0 - eta (eps0(c') - e0) adds to e0."""
    return -eta * (eps_target - eps_empty)


def moved_p(frozen: Frozen, theta, concepts, at: Noised, p, eps_original, config: EraseConfig):
    """Step 2: (p (G, k, d) after a sign step at the latents `at`, L_adv).

    concepts (G,): the prompts' own; eps_original: theta0's predictions for them, (B, h, w, C).
    """
    # Two goals of which the second has no weight: the shape that v's program is compiled for.
    goals, weights = _stack(eps_original, eps_original), given([1.0, 0.0])
    template, size = _rows(frozen.prompt_template, concepts), given(config.soft.gamma)
    return soft.sign_step(frozen, theta, template, p, at, goals, weights, size, remat=config.low_memory)


def moved_v(frozen: Frozen, theta, concepts, at: Noised, v, eps_original, config: EraseConfig):
    """Step 3: (v (G, m', d) after a sign step, L_aet); the arguments as in `moved_p`."""
    eps_current = predicted(frozen, theta, at, _rows(frozen.concept_emb, concepts))
    goals, weights = _stack(eps_original, eps_current), given([1.0, 1.0])
    template, size = _rows(frozen.target_template, concepts), given(config.soft.beta)
    return soft.sign_step(frozen, frozen.unet, template, v, at, goals, weights, size, remat=config.low_memory)


def _adversaries(frozen: Frozen, theta, concepts, at: Noised, v, p, config: EraseConfig):
    """Steps 2 and 3, of those that move: (v, p, {"L_aet", "L_adv"})."""
    metrics = {}
    args = frozen, theta, concepts, at
    eps_original = predicted(frozen, frozen.unet, at, _rows(frozen.concept_emb, concepts))
    if config.moves_p:
        p, metrics["L_adv"] = moved_p(*args, p, eps_original, config)
    if config.moves_v:
        v, metrics["L_aet"] = moved_v(*args, v, eps_original, config)
    return v, p, metrics


def prompts_of(frozen: Frozen, concepts, v, p, config: EraseConfig) -> tuple[Conditioning, Conditioning]:
    """(c', c*), G rows each; c_e where the config has no soft tokens there."""
    c_e = _rows(frozen.concept_emb, concepts)
    c_prime = soft.encoded(frozen, _rows(frozen.target_template, concepts), v) if config.has_target else c_e
    c_star = soft.encoded(frozen, _rows(frozen.prompt_template, concepts), p) if config.has_prompt else c_e
    return c_prime, c_star


def goal_of(frozen: Frozen, at: Noised, c_prime: Conditioning, c_star: Conditioning, eta):
    """Step 4's target: (`Goal` of c* with eps0(c_0), what is to be added to it: -eta (eps0(c') - eps0(c_0)))."""
    pair = _joined(at.z.shape[0], c_prime, frozen.empty_emb)
    eps_target, eps_empty = _halves(predicted(frozen, frozen.unet, at, pair, shares=2))
    return Goal(c_star, eps_empty), _towards(eta, eps_empty, eps_target)


def gradients_of(frozen: Frozen, theta, at: Noised, goal: Goal, preserve: Goal | None, weight, trainable_set, remat):
    """({"L_e"[, "L_p"]}, theta's predictions for the goal (B, h, w, C), gradient of L_e + weight L_p with respect to
    the trainable tensors, stacked by group). With remat the latents take turns (in_turn.py)."""
    flat, B = flatten(theta), at.z.shape[0]
    tensors = trainable.select(theta, trainable_set)
    goals = [Goal(per_latent(goal.cond, B), goal.eps), *([] if preserve is None else [preserve])]
    at_once = in_turn.at_once(B, frozen.placement, remat)

    def loss(tensors, at, *goals):
        params, count = unflatten(flat | tensors), at.z.shape[0]
        # In one call of the network.
        z, t = (jnp.concatenate([x] * len(goals)) for x in (at.z, at.t))
        cond = join(*(goal.cond for goal in goals))
        eps = predict.predict(frozen.unet_graph, params, frozen.schedule, z, t, cond, remat=remat)
        eps = [eps[i * count : (i + 1) * count] for i in range(len(goals))]
        losses = {
            name: jnp.mean(jnp.square(mine - wanted.eps)) * (count / B)
            for name, mine, wanted in zip(("L_e", "L_p"), eps, goals)
        }
        return losses["L_e"] + weight * losses.get("L_p", 0.0), (losses, eps[0])

    def some(at, *goals):
        gradients, (losses, eps) = jax.grad(loss, has_aux=True)(tensors, at, *goals)
        # Tensor by tensor, so that each may be freed early; without it XLA's CPU backend fuses the backward pass into
        # what follows and compiles for minutes.
        gradients = jax.tree.map(jax.lax.optimization_barrier, gradients)
        if frozen.placement is not None and at_once < B:  # else each device would add up all of every tensor
            gradients = frozen.placement.tensors(gradients)
        return (gradients, losses), eps

    (gradients, losses), eps = in_turn.rows(some, (at, *goals), at_once)
    return losses, eps, groups.stack(gradients)


@program(static_argnames=("trainable_set", "grp", "remat"), donate_argnames="state")
def _update(
    frozen: Frozen,
    theta,
    state: State,
    at: Noised,
    goal: Goal,
    preserve: Goal | None,
    weight,
    learning_rate,
    *,
    trainable_set: str,
    grp: GRPConfig,
    remat: bool,
):
    """Steps 4 to 6: gradient, DGR, Adam. (state with its next drift, opt_state, omega, conflict and step, theta's
    predictions for the goal before, metrics)."""
    losses, eps, gradients = gradients_of(frozen, theta, at, goal, preserve, weight, trainable_set, remat)
    # P_before up to a positive factor, which its sign does not need: the drift that the last step started from.
    before = rectify.times(state.conflict, adam.drift_before(state.drift, state.opt_state, learning_rate))
    g, found = rectify.retain(gradients, state.drift, state.omega, before, grp)
    direction, opt_state = adam.update(g, state.opt_state)
    update = jax.tree.map(lambda u: -learning_rate * u, direction)
    drift = jax.tree.map(jnp.add, state.drift, update)
    per_tensor = {name: groups.gather(getattr(found, name)) for name in ("cosine", "kept", "omega")}
    metrics = {
        **losses,
        "L_r": 0.5 * rectify.tree_dot(state.drift, state.drift),
        "conflict_share": jnp.mean(per_tensor["cosine"] < 0),
        "flip_share": jnp.mean(per_tensor["kept"] < 0),
        "mean_cosine": jnp.mean(per_tensor["cosine"]),
        "omega": jnp.mean(per_tensor["omega"]),
        "update_dot_gr": rectify.tree_dot(update, state.drift),
        "drift_norm": jnp.sqrt(rectify.tree_dot(drift, drift)),
        "per_tensor": per_tensor,
    }
    new = {"drift": drift, "opt_state": opt_state, "omega": found.omega, "conflict": found.conflict}
    if frozen.placement is not None:
        new = frozen.placement.tensors(new)
    return dataclasses.replace(state, step=state.step + 1, **new), eps, metrics


class Inside(NamedTuple):
    """Which latents are in context, (B,), and what they come with where they have trajectories of their own."""

    latents: jax.Array
    drawn: shown.Drawn | None


def _random_words(frozen: Frozen, concepts, at: Noised, inside: Inside | None, key, config: EraseConfig) -> words.Words:
    batch, in_context = at.z.shape[0], inside is not None
    instead = None if inside is None or inside.drawn is None else (inside.latents, inside.drawn.ids)
    cond = words.random_prompts(
        frozen.text_graph, frozen.text, frozen.vocabulary, key, concepts if in_context else None, instead, batch=batch
    )
    cond, joined = _split_words(cond) if in_context else (cond, None)
    if not config.moves_kappa:
        return words.Words(cond, joined, predicted(frozen, frozen.unet, at, cond), None)
    both = predicted(frozen, frozen.unet, at, _joined(batch, cond, joined), shares=2)
    return words.Words(cond, joined, *_added(both))


@jax.jit
def _split_words(cond: Conditioning):
    half = len(cond.embedding) // 2
    return jax.tree.map(lambda x: x[:half], cond), jax.tree.map(lambda x: x[half:], cond)


@jax.jit
def _added(both):
    eps, eps_joined = jnp.split(both, 2)
    return eps, eps_joined - eps


def _draw(frozen: Frozen, theta, pools: dict, name: str, cond: Conditioning, turn: Turn, key, config: EraseConfig):
    """(`Noised`, grid positions, pools) under `cond`, a row for each of the turn's prompts."""
    how = {"batch": config.batch, "offset": config.latents.offset, "levels": config.latents.levels}
    theta = frozen.unet if config.latents.by_original else theta
    if name not in pools:
        return *latents.fresh(frozen, theta, cond, key, steps=config.latents.steps, **how), pools
    # A concept's first prompt of the batch stands at the concept's own place in it.
    cond = _first(cond, len(turn.own))
    how["refresh_every"] = config.latents.refresh_every
    at, i, pool = latents.pooled(frozen, theta, pools[name], cond, turn.own, turn.visits, key, **how)
    return at, i, pools | {name: pool}


def erase_step(state: State, frozen: Frozen, config: EraseConfig) -> tuple[State, dict]:
    """One training step: (new state, metrics). The old state's buffers are donated: do not reuse it.

    Metrics, float32 scalars: L_aet, L_adv (where v and p move; means over the batch's prompts), L_e, L_p (where
    preserved), L_r, conflict_share (of tensors), flip_share (whose conflict has changed since the step before),
    mean_cosine (of g_e, which is here the gradient of L_e + weight L_p, and g_r), omega (mean), update_dot_gr
    (<update, g_r>), drift_norm (||theta - theta0||), t (mean); with words.context="push" or "shown" left_in_context
    (the share, context.py) and kappa (mean, after the step). And "per_tensor": {"cosine", "kept", "omega"}, each
    (number of trainable tensors,) in the order of `groups.order`.
    """
    keys = keys_of(given(config.seed, jnp.uint32), state.step)
    turn = _turn(state.step, len(state.p), len(frozen.concept_emb.embedding), config.batch)
    theta = trainable.add_drift(frozen.unet, state.drift, config.trainable, frozen.low_bits, frozen.placement)
    v, p = _rows((state.v, state.p), turn.prompts)
    if config.soft.life == "step":
        v, p = soft.drawn(frozen, keys.v, v.shape[:2]), soft.drawn(frozen, keys.p, p.shape[:2])
    pools, metrics, at = state.latents, {}, None
    if config.moves_v or config.moves_p or config.latents.shared:
        c_e = _rows(frozen.concept_emb, turn.concepts)
        at, _, pools = _draw(frozen, theta, pools, "attack", c_e, turn, keys.attack, config)
    if config.moves_v or config.moves_p:
        v, p, metrics = _adversaries(frozen, theta, turn.concepts, at, v, p, config)
    c_prime, c_star = prompts_of(frozen, turn.concepts, v, p, config)
    if not config.latents.shared:
        at, _, pools = _draw(frozen, theta, pools, "loss", c_prime, turn, keys.loss, config)
    inside, at, pools = _inside(frozen, theta, state, pools, at, turn, config)
    goal, push = goal_of(frozen, at, c_prime, c_star, given(config.eta))
    state = dataclasses.replace(state, v=_put(state.v, turn.prompts, v), p=_put(state.p, turn.prompts, p))
    state = dataclasses.replace(state, latents=pools)
    state, more = _descend(state, frozen, theta, turn, at, inside, goal, push, keys.words, config)
    return state, metrics | more | {"t": _mean(at.t)}


def _inside(frozen: Frozen, theta, state: State, pools: dict, at: Noised, turn: Turn, config: EraseConfig):
    """(`Inside` or None, the batch's latents, pools): those in context are others where they have their own."""
    if config.words.context == "none":
        return None, at, pools
    of = {"prompt_count": len(state.p), "batch": config.batch}
    inside = Inside(context.whose_turn(state.step, turn.prompts, **of), None)
    if config.words.context == "shown":
        how = {"batch": config.batch, "refresh_every": config.context_refresh}
        seed = given(config.seed, jnp.uint32)
        found, pool = shown.drawn(frozen, theta, pools["context"], turn.own, turn.visits, seed, state.step, **how)
        inside, pools = inside._replace(drawn=found), pools | {"context": pool}
        at = context.chosen(inside.latents, found.at, at)
    return inside, at, pools


def _descend(state, frozen, theta, turn: Turn, at: Noised, inside: Inside | None, goal: Goal, push, key, config):
    """From the target on: random words where they are asked for, the update, kappa."""
    preserve, number = None, state.step
    if config.draws_words:
        drawn = _random_words(frozen, turn.concepts, at, inside, key, config)
        if config.words.preserve:
            preserve = Goal(drawn.cond, drawn.eps)
    seen = None if inside is None or inside.drawn is None else inside.drawn.shown
    if inside is not None:
        goal = context.in_context(inside.latents, turn.prompts, goal, push, drawn, state.kappa, seen)
    else:
        goal = Goal(goal.cond, _sum(goal.eps, push))
    kappa = state.kappa
    rate = context.rate_now(number, steps=config.steps) if config.words.context == "push" else None
    state, eps, metrics = _update(
        frozen, theta, dataclasses.replace(state, kappa=None), at, goal, preserve, given(config.words.preserve),
        given(config.learning_rate), trainable_set=config.trainable, grp=config.grp, remat=config.low_memory,
    )  # fmt: skip
    if config.moves_kappa:
        if seen is None:
            kappa, left = context.next_kappa(kappa, turn.prompts, inside.latents, eps, drawn, rate)
        else:
            kappa, left = context.next_kappa_shown(kappa, turn.prompts, inside.latents, seen)
        metrics |= {"left_in_context": left, "kappa": _mean(kappa)}
    return dataclasses.replace(state, kappa=kappa), metrics


_sum = jax.jit(jnp.add)
