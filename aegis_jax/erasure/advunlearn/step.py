"""One step of AdvUnlearn (arXiv 2405.15234), a pure function made of a few compiled programs.

With theta0 the original and theta the trained weights, of the text encoder or of the UNet, and e0(c) short for
eps(theta0, z, t, c): the attack on theta starts from random words p and takes n steps, each at latents of its own, on

  A(p) = ||eps(theta, z, t, c*(p)) - e0(c_e)||^2,   c*(p) = E([BOS, p, concept, EOS])

and theta takes a step of Adam on

  L_e + w L_p,   L_e = ||eps(theta, z, t, c*) - [e0(c_0) - eta (e0(c_e) - e0(c_0))]||^2,
                 L_p = ||eps(theta, z_r, t_r, c_r) - e0(c_r)||^2   over prompts c_r to retain,

where c* and c_r are encoded by the text encoder that is trained. Before the first attack c* := c_e, which is ESD. All
squared norms are means over batch and elements. Latents are drawn by the current UNet under theta0's encodings, as
published, so that of a trained text encoder they know nothing.

Shapes: B latents, R retained prompts of the step, L tokens, k soft tokens, d token-embedding width.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.conditioning import Conditioning, join, per_latent
from aegis_jax.diffusion.vocabulary import random_words
from aegis_jax.erasure import adam, latents, networks, turns
from aegis_jax.erasure.advunlearn.config import AdvUnlearnConfig
from aegis_jax.erasure.advunlearn.setup import Frozen, State
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.networks import Networks, encoded, noise, predicted
from aegis_jax.erasure.programs import given, program

_square = lambda x: jnp.mean(jnp.square(x))  # noqa: E731
_mean = jax.jit(lambda x: jnp.mean(x.astype(jnp.float32)))


@partial(jax.jit, static_argnums=2)
def _keys(seed, step, attacks: int):
    """(of the start, of the loss's latents, of the retained ones, of each step of the attack)."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    start, loss, retain, attack = jax.random.split(key, 4)
    return start, loss, retain, [jax.random.fold_in(attack, i) for i in range(attacks)]


@partial(jax.jit, static_argnums=(1, 2))
def _taken(step, batch: int, prompts: int):
    """(which prompts are retained in this step, all taking turns; how many steps each has had before), (batch,)."""
    dealt = step * batch + jnp.arange(batch, dtype=jnp.int32)
    return dealt % prompts, dealt // prompts


def _filled(template, p):
    """The soft tokens p (1, k, d) in their template (1, L, d)."""
    return template.at[:, 1 : 1 + p.shape[1]].set(p)


filled = jax.jit(_filled)


def attacked(net: Networks, template, p, at: Noised, goal, *, remat: bool = False):
    """(A(p) of the networks `net`, its gradient (1, k, d)); goal: e0(c_e) at the latents, (B, h, w, C)."""
    loss = lambda p: _square(noise(net, at, encoded(net, _filled(template, p)), remat=remat) - goal)  # noqa: E731
    return jax.value_and_grad(loss)(p)


@program(static_argnames=("rule", "remat"))
def _attack_step(net0: Networks, net: Networks, template, concept_emb, p, moments, at: Noised, rate, *, rule, remat):
    """One step on p: (p, Adam's moments, A(p) before)."""
    loss, gradient = attacked(net, template, p, at, noise(net0, at, concept_emb), remat=remat)
    if rule == "sign":
        return p - rate * jnp.sign(gradient), moments, loss
    direction, moments = adam.update({"p": gradient}, moments)
    return p - rate * direction["p"], moments, loss


@jax.jit
def _asked(at: Noised, kept: Noised, concept_emb: Conditioning, empty_emb: Conditioning, retained_emb: Conditioning):
    """What `goals` asks theta0, in one call."""
    count = len(at.z)
    many = Noised(jnp.concatenate([at.z, at.z, kept.z]), jnp.concatenate([at.t, at.t, kept.t]))
    return many, join(per_latent(concept_emb, count), per_latent(empty_emb, count), retained_emb)


@partial(jax.jit, static_argnums=1)
def _told(eps, count: int, eta):
    concept, empty, retained = jnp.split(eps, [count, 2 * count])
    return empty - eta * (concept - empty), retained


def goals(net0: Networks, at: Noised, kept: Noised, concept_emb: Conditioning, retained_emb: Conditioning, eta):
    """(what theta shall predict under c*, (B, h, w, C); what under the retained prompts, (R, h, w, C)), of theta0."""
    return _told(predicted(net0, *_asked(at, kept, concept_emb, net0.empty_emb, retained_emb)), len(at.z), eta)


def gradients_of(
    net: Networks, tokens, retained, at: Noised, kept: Noised, wanted: tuple, weight, trainable_set, remat
):
    """({"L_e", "L_p"} of the networks `net`, the gradient of L_e + weight L_p by the trained tensors, by group).

    tokens: c*'s token embeddings (1, L, d), at latents B; retained: (R, L, d), at R latents; wanted: of `goals`.
    """
    count, z, t = at.z.shape[0], jnp.concatenate([at.z, kept.z]), jnp.concatenate([at.t, kept.t])

    def loss(now: Networks):
        star, rest = (encoded(now, x) for x in (tokens, retained))
        eps = noise(now, Noised(z, t), join(per_latent(star, count), rest), remat=remat)
        losses = {"L_e": _square(eps[:count] - wanted[0]), "L_p": _square(eps[count:] - wanted[1])}
        return losses["L_e"] + weight * losses["L_p"], losses

    return networks.gradients(net, trainable_set, loss)


@program(static_argnames=("trainable_set", "remat"), donate_argnames="state")
def _update(net, state: State, tokens, retained, at, kept, wanted, weight, rate, *, trainable_set: str, remat: bool):
    losses, gradients = gradients_of(net, tokens, retained, at, kept, wanted, weight, trainable_set, remat)
    drift, opt_state, size = adam.descended(state.drift, state.opt_state, gradients, rate)
    state = dataclasses.replace(state, step=state.step + 1, drift=drift, opt_state=opt_state)
    return state, losses | {"drift_norm": size}


def _drawn(net: Networks, pools: dict, name: str, cond: Conditioning, turn: tuple, key, batch: int, config):
    """(`Noised` of `batch` latents under the rows of `cond`, pools). turn: (numbers of the rows, their visits)."""
    if name not in pools:
        return latents.fresh(net, net.unet, cond, key, batch=batch, steps=config.latents.steps)[0], pools
    how = {"batch": batch, "refresh_every": config.latents.refresh_every}
    at, _, pool = latents.pooled(net, net.unet, pools[name], cond, *turn, key, **how)
    return at, pools | {name: pool}


def erase_step(state: State, frozen: Frozen, config: AdvUnlearnConfig) -> tuple[State, dict]:
    """One training step: (new state, metrics). The old state's buffers are donated: do not reuse it.

    Concepts take turns. Metrics, float32 scalars: L_e, L_p, L_adv (of the attack's last step; none before the first
    attack), drift_norm, t (mean, of L_e).
    """
    net0, net = frozen.net, networks.moved(frozen.net, state.drift, config.trainable)
    key_p, key_loss, key_kept, key_attack = _keys(given(config.seed, jnp.uint32), state.step, config.attack.steps)
    rows = frozen.plain, frozen.template, frozen.concept_emb, state.p
    tokens, template, concept_emb, p = turns.row(rows, state.step, len(frozen.plain))
    number, visits, never = turns.turn(state.step, len(frozen.plain))
    draw = partial(_drawn, net, config=config)
    # The first draw of a step is the one that redraws a pool, so that the attack finds it as the loss does.
    at, pools = draw(state.latents, "erase", concept_emb, (number, visits), key_loss, config.batch)
    metrics = {}
    if _attacks(state.step, config):
        if config.attack.start == "random":
            p = random_words(net0.text_graph, net0.text, net0.word_ids, key_p, p.shape[:2])
        moments, rate = adam.init({"p": p}, jnp.float32), given(config.attack.learning_rate)
        how = {"rule": config.attack.rule, "remat": config.low_memory}
        for key in key_attack:
            own, pools = draw(pools, "erase", concept_emb, (number, never), key, config.batch)
            p, moments, metrics["L_adv"] = _attack_step(net0, net, template, concept_emb, p, moments, own, rate, **how)
        tokens = filled(template, p)
    taken, before = _taken(state.step, config.retain.batch, len(frozen.retained))
    retained, retained_emb = _chosen((frozen.retained, frozen.retained_emb), taken)
    kept, pools = draw(pools, "retain", retained_emb, (taken, before), key_kept, config.retain.batch)
    wanted = goals(net0, at, kept, concept_emb, retained_emb, given(config.eta))
    state = dataclasses.replace(state, p=turns.put(state.p, state.step, p), latents={})
    state, found = _update(
        net, state, tokens, retained, at, kept, wanted, given(config.retain.weight), given(config.learning_rate),
        trainable_set=config.trainable, remat=config.low_memory,
    )  # fmt: skip
    return dataclasses.replace(state, latents=pools), found | metrics | {"t": _mean(at.t)}


_chosen = jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree))


def _attacks(step, config: AdvUnlearnConfig) -> bool:
    """Whether the warm-up is over. While the step is traced, yes: so all of its programs are found."""
    return isinstance(step, jax.core.Tracer) or int(jax.device_get(step)) >= config.warm_up
