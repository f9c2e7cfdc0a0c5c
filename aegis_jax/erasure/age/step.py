"""One step of AGE (Bui et al., ICLR 2025, arXiv 2501.18950), a pure function made of a few compiled programs.

The concept becomes another: a mixture c_t of the encodings of words, weighted by a Gumbel softmax of logits pi. With
x0(z, t, c) = (z - sqrt(1 - a_t) eps(z, t, c)) / sqrt(a_t), what a prediction says of the picture, theta takes a step of
Adam down

  L_e + w_p L_p,   L_e = ||x0_theta(z, c_e) - [x0_0(z, c_t) - eta (x0_0(z, c_e) - x0_0(z, c_t))]||^2
                   L_p = ||x0_theta(z', c_t) - x0_0(z', c_t)||^2

and then, with noise, latents and a mixture of their own, pi a step of Adam up

  A(pi) = ||x0_theta(z, c_e) - x0_0(z, c_t)||^2 + w_p ||x0_theta(z', c_t) - x0_0(z', c_t)||^2:

the adversary looks for what the concept has not become, and for what becoming it has hurt. z is drawn under c_e, z'
under c_t. All squared norms are means over batch and elements.

Shapes: B latents, C words to choose from, L tokens, D text width.
"""

from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.diffusion import predict
from aegis_jax.diffusion.conditioning import Conditioning, join, per_latent
from aegis_jax.diffusion.schedule import to_original
from aegis_jax.erasure import adam, latents, networks, turns
from aegis_jax.erasure.age.config import AgeConfig, TargetConfig
from aegis_jax.erasure.age.setup import Frozen, State
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.networks import Networks
from aegis_jax.erasure.programs import given, program

_square = lambda x: jnp.mean(jnp.square(x))  # noqa: E731
_mean = jax.jit(lambda x: jnp.mean(x.astype(jnp.float32)))


@jax.jit
def _keys(seed, step):
    """For theta's step and for pi's: (of the mixture, of z, of z')."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.split(key, 6).reshape(2, 3)


def mixture(pi, gumbel, target: TargetConfig):
    """Weights (1, C) of the words, by logits pi (1, C) and Gumbel noise (1, C)."""
    soft = jax.nn.softmax((pi + gumbel) / jnp.float32(target.temperature))
    if target.form == "hard":
        one = jax.nn.one_hot(soft.argmax(-1), soft.shape[-1], dtype=soft.dtype)
        return one + soft - jax.lax.stop_gradient(soft)
    least = jax.lax.top_k(soft, min(target.top, soft.shape[-1]))[0][:, -1:]
    kept = jnp.where(soft >= least, soft, 0.0)
    return kept / kept.sum(-1, keepdims=True)


def mixed(candidates, weights) -> Conditioning:
    """c_t: the words' encodings (1, C, L, D) by their weights (1, C), one row."""
    return Conditioning(jnp.einsum("nc,ncld->nld", weights, candidates))


@program(static_argnames="target")
def _target(candidates, counts, pi, key, *, target: TargetConfig):
    """(c_t, the noise that it was drawn with). counts: of the words, (1,); the rest are never drawn."""
    drawn = jax.random.gumbel(key, pi.shape, jnp.float32)
    gumbel = jnp.where(jnp.arange(pi.shape[1], dtype=jnp.int32) < counts[:, None], drawn, -jnp.inf)
    return mixed(candidates, mixture(pi, gumbel, target)), gumbel


def picture(net: Networks, at: Noised, cond: Conditioning, *, remat: bool = False):
    """x0 of `net` (B, h, w, C) at latents B, latent i under row i mod G of cond. From the network's own output, which
    holds where a_t is 0."""
    output = predict.output(net.unet_graph, net.unet, at.z, at.t, cond, remat=remat)
    return to_original(net.schedule, output, at.z, at.t)


@program
def predicted(net: Networks, at: Noised, cond: Conditioning):
    """`picture` as a program of its own."""
    return picture(net, at, cond)


@jax.jit
def _asked(at: Noised, kept: Noised, c_e: Conditioning, c_t: Conditioning):
    """What `goals` asks theta0, in one call."""
    count = len(at.z)
    many = Noised(jnp.concatenate([at.z, at.z, kept.z]), jnp.concatenate([at.t, at.t, kept.t]))
    return many, join(*(per_latent(cond, count) for cond in (c_e, c_t, c_t)))


@partial(jax.jit, static_argnums=1)
def _told(pictures, count: int, eta):
    concept, target, kept = jnp.split(pictures, [count, 2 * count])
    return target - eta * (concept - target), kept


def goals(net0: Networks, at: Noised, kept: Noised, c_e: Conditioning, c_t: Conditioning, eta):
    """What theta shall draw: (x0 at z under c_e, at z' under c_t), (B, h, w, C), of theta0."""
    return _told(predicted(net0, *_asked(at, kept, c_e, c_t)), len(at.z), eta)


def gradients_of(
    net: Networks, at: Noised, kept: Noised, c_e: Conditioning, c_t: Conditioning, wanted, weight, trainable_set, remat
):
    """({"L_e", "L_p"} of the networks `net`, the gradient of L_e + weight L_p by the trained tensors, by group).

    wanted: of `goals`.
    """

    count = len(at.z)
    many = Noised(jnp.concatenate([at.z, kept.z]), jnp.concatenate([at.t, kept.t]))
    conds = join(per_latent(c_e, count), per_latent(c_t, count))

    def loss(now: Networks):
        drawn = picture(now, many, conds, remat=remat)
        losses = {"L_e": _square(drawn[:count] - wanted[0]), "L_p": _square(drawn[count:] - wanted[1])}
        return losses["L_e"] + weight * losses["L_p"], losses

    return networks.gradients(net, trainable_set, loss)


@program(static_argnames=("trainable_set", "remat"), donate_argnames=("drift", "opt_state"))
def _update(net, drift, opt_state, at, kept, c_e, c_t, wanted, weight, rate, *, trainable_set: str, remat: bool):
    losses, gradients = gradients_of(net, at, kept, c_e, c_t, wanted, weight, trainable_set, remat)
    drift, opt_state, size = adam.descended(drift, opt_state, gradients, rate)
    return drift, opt_state, losses | {"drift_norm": size}


def adversary(net0: Networks, net: Networks, at, kept, c_e, candidates, pi, gumbel, weight, target, remat: bool):
    """(A(pi) of the networks `net`, its gradient (1, C)). at, kept: `Noised`, z and z'."""
    now = picture(net, at, c_e)

    def loss(pi):
        c_t = mixed(candidates, mixture(pi, gumbel, target))
        far, hurt = (
            _square(theirs - picture(net0, where, c_t, remat=remat))
            for where, theirs in ((at, now), (kept, picture(net, kept, c_t, remat=remat)))
        )
        return far + weight * hurt

    return jax.value_and_grad(loss)(pi)


@program(static_argnames=("target", "remat"))
def _ascend(net0, net, at, kept, c_e, candidates, pi, gumbel, moments, visits, weight, rate, *, target, remat: bool):
    """A step of Adam up A(pi), the concept's own after `visits` (1,) before: (pi, moments, A before)."""
    found, gradient = adversary(net0, net, at, kept, c_e, candidates, pi, gumbel, weight, target, remat)
    before = adam.init({"pi": pi}, jnp.float32)._replace(count=visits[0], **{k: {"pi": x} for k, x in moments.items()})
    direction, after = adam.update({"pi": gradient}, before)
    return pi + rate * direction["pi"], {"mu": after.mu["pi"], "nu": after.nu["pi"]}, found


def erase_step(state: State, frozen: Frozen, config: AgeConfig) -> tuple[State, dict]:
    """One training step, of theta and then of pi: (new state, metrics). The old state's buffers are donated: do not
    reuse it.

    Concepts take turns. Metrics, float32 scalars: L_e, L_p, L_adv (A of pi before its step), drift_norm, t (mean).
    """
    net0, target, count = frozen.net, config.target, len(frozen.candidates)
    ours, theirs = _keys(given(config.seed, jnp.uint32), state.step)
    number, visits, never = turns.turn(state.step, count)
    rows = frozen.concept_emb, frozen.candidates, frozen.counts, state.pi
    c_e, candidates, counts, pi = turns.row(rows, state.step, count)
    weight, remat = given(target.weight), config.low_memory

    net = networks.moved(net0, state.drift, config.trainable)
    c_t, _ = _target(candidates, counts, pi, ours[0], target=target)
    at, kept, pools = _drawn(net, state.latents, c_e, c_t, (number, visits), ours, config)
    wanted = goals(net0, at, kept, c_e, c_t, given(config.eta))
    drift, opt_state, found = _update(
        net, state.drift, state.opt_state, at, kept, c_e, c_t, wanted, weight, given(config.learning_rate),
        trainable_set=config.trainable, remat=remat,
    )  # fmt: skip
    metrics = found | {"t": _mean(at.t)}

    net = networks.moved(net0, drift, config.trainable)
    c_t, gumbel = _target(candidates, counts, pi, theirs[0], target=target)
    at, kept, pools = _drawn(net, pools, c_e, c_t, (number, never), theirs, config)
    moments = turns.row(state.moments, state.step, count)
    pi, moments, metrics["L_adv"] = _ascend(
        net0, net, at, kept, c_e, candidates, pi, gumbel, moments, visits, weight, given(target.learning_rate),
        target=target, remat=remat,
    )  # fmt: skip
    pi, moments = turns.put((state.pi, state.moments), state.step, (pi, moments))
    return State(_next(state.step), drift, opt_state, pi, moments, pools), metrics


def _drawn(net: Networks, pools: dict, c_e, c_t, turn: tuple, keys, config: AgeConfig):
    """(`Noised` z under c_e, z' under c_t, pools). turn: (the concept's number, its visits)."""
    how = {"batch": config.batch}
    kept = latents.fresh(net, net.unet, c_t, keys[2], steps=config.latents.steps, **how)[0]
    if not pools:
        return latents.fresh(net, net.unet, c_e, keys[1], steps=config.latents.steps, **how)[0], kept, pools
    how["refresh_every"] = config.latents.refresh_every
    at, _, pool = latents.pooled(net, net.unet, pools["erase"], c_e, *turn, keys[1], **how)
    return at, kept, {"erase": pool}


_next = jax.jit(lambda step: step + 1)
