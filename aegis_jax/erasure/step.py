"""One training step of AEGIS (method.md section 3), as a pure function made of a few compiled programs.

Read from the bottom: `erase_step` is the step that training runs (`step_at` from the latents on), `explicit_step` the
same step with every random draw given, for checks from outside, and `_core` what the two share. The programs take
their weights as arguments, so frozen and current UNet share one compilation:

  latents.fresh / buffered     z_t and t, by guided sampling with the current weights
  _predict                     noise of theta0 for {c_e, c_0} stacked, of theta for c_e, of theta0 for c' and for
                               random words, if those are used
  target.sign_step             gradient of a distance to soft tokens: AET with theta0, adversarial prompt with theta
  context.goal_in_context      the concept among random words instead, for half of the latents, if that is asked for
  _erase_update                gradient of L_e (and L_p), GRP and Adam in one pass

Randomness is `fold_in(key(seed), step)` and named splits of it; no key is stored. What the host hands to a program it
hands over by name (`given`), and what lies between the programs is compiled too: a step passes under
`jax.transfer_guard_host_to_device("disallow")`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.threads import beside
from aegis_jax.erasure import adam, context, groups, networks, prompt, rectify, target, trainable, words
from aegis_jax.erasure import latents as latents_lib
from aegis_jax.erasure.config import EraseConfig, GRPConfig
from aegis_jax.erasure.programs import given, program
from aegis_jax.erasure.setup import freeze
from aegis_jax.erasure.state import Frozen, State
from aegis_jax.models.layout import to_torch, torch_key
from aegis_jax.models.model import flatten, unflatten

_WORDS = 0x9E5E  # folded into a step's key: none of its own splits


@jax.jit
def _keys(seed, step):
    """A step's keys: that of its latents, that of its random words."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return key, jax.random.fold_in(key, _WORDS)


@partial(jax.jit, static_argnames="count")
def _concepts_of(prompts, *, count: int):
    return prompts % count


@jax.jit
def _of_concepts(concept_emb, prompt_template, concepts):
    """Of concepts (G,): c_e (G, L, D), templates of the adversarial prompt (G, L, d)."""
    return concept_emb[concepts, 0], prompt_template[concepts, 0]


@jax.jit
def _soft_tokens(v, p, prompts):
    return v[prompts], p[prompts]


@jax.jit
def _advanced(step, v, p, prompts, new_v, new_p):
    """The state's step, v and p after a step."""
    return step + 1, v.at[prompts].set(new_v), p.at[prompts].set(new_p)


@jax.jit
def _away(eta, eps_target, eps_empty):
    return -eta * (eps_target - eps_empty)


_mean = jax.jit(lambda x: jnp.mean(x.astype(jnp.float32)))
_predict = program(networks.predict, static_argnums=0)
_encode_soft = program(networks.encode_soft, static_argnums=0)


def _erasure_gradients(frozen: Frozen, theta: dict, z_t, t, c_star, goal, preserved, trainable_set: str, remat: bool):
    """The losses {"L_e"} (method.md 3.4), theta's predictions for c_star (B, h, w, C), and the gradient of the losses'
    sum with respect to the trainable tensors, stacked by group.

    preserved: None, or the weight of "L_p", its random prompts (B, L, D) and theta0's predictions for them
    (B, h, w, C): then it joins the sum, in the same call of the network.
    """
    flat, B = flatten(theta), z_t.shape[0]

    def loss(tensors):
        params = unflatten(flat | tensors)
        noise = partial(networks.predict, frozen.unet_graph, params, frozen.schedule, remat=remat)
        if preserved is None:
            eps = noise(z_t, t, c_star)
            L_e = networks.mean_square(eps - goal)
            return L_e, ({"L_e": L_e}, eps)
        weight, c_p, eps_p = preserved
        text_emb = jnp.concatenate([networks.per_latent(c_star, B), c_p])
        eps = noise(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), text_emb)
        L_e, L_p = networks.mean_square(eps[:B] - goal), networks.mean_square(eps[B:] - eps_p)
        return L_e + weight * L_p, ({"L_e": L_e, "L_p": L_p}, eps[:B])

    gradients, (losses, eps) = jax.grad(loss, has_aux=True)(trainable.select(theta, trainable_set))
    # Tensor by tensor, so that each may be freed early; without it XLA's CPU backend fuses the backward pass into
    # what follows and compiles for minutes.
    return losses, eps, groups.stack(jax.tree.map(jax.lax.optimization_barrier, gradients))


@program(static_argnames=("trainable_set", "grp", "remat"), donate_argnames=("drift", "opt_state", "previous"))
def _erase_update(
    frozen,
    theta,
    drift,
    opt_state,
    omega,
    previous,
    z_t,
    t,
    c_star,
    goal,
    preserved,
    learning_rate,
    *,
    trainable_set: str,
    grp: GRPConfig,
    remat: bool,
):
    """Steps 4 to 7: gradient of L_e, with L_p if preserved, GRP, omega, Adam.

    Returns the new (drift, opt_state, omega, previous), theta's predictions for c_star before them, metrics.
    """
    losses, eps, gradients = _erasure_gradients(frozen, theta, z_t, t, c_star, goal, preserved, trainable_set, remat)
    if previous is not None and not grp.after_adam:
        previous = previous | {"drift": adam.drift_before(drift, opt_state, learning_rate)}
    next_omega = rectify.next_omega(omega, gradients, drift, previous, grp)
    # What is projected: the gradient that enters Adam, or Adam's own direction.
    raw = gradients
    if grp.after_adam:
        raw, opt_state = adam.update(_as_float32(gradients), opt_state)
    if previous is not None:
        previous = rectify.projection(raw, drift, grp)
    direction, _, cosines = rectify.retain(raw, drift, omega, grp)
    if not grp.after_adam:
        direction, opt_state = adam.update(direction, opt_state)
    update = jax.tree.map(lambda u: -learning_rate * u, direction)
    cosines = rectify.gather(cosines)
    metrics = {
        **losses,
        "L_r": 0.5 * rectify.tree_dot(drift, drift),
        "conflict_share": jnp.mean(cosines < 0),
        "mean_cosine": jnp.mean(cosines),
        "omega": jnp.mean(rectify.gather(omega)) if grp.omega_per_tensor else omega,
        "update_dot_gr": rectify.tree_dot(update, drift),
    }
    drift = jax.tree.map(jnp.add, drift, update)
    metrics["drift_norm"] = jnp.sqrt(rectify.tree_dot(drift, drift))
    if frozen.placement is not None:
        new = drift, opt_state, next_omega, previous
        drift, opt_state, next_omega, previous = frozen.placement.tensors(new)
    return drift, opt_state, next_omega, previous, eps, metrics


def _as_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _core(frozen: Frozen, theta, concepts, z_t, t, v, p, config: EraseConfig):
    """Steps 2 and 3 and the constants of step 4: (v, p, c_star (G, L, D), eps_empty, push, metrics).

    The goal of erasure is eps_empty + push: theta0's prediction for the empty prompt, and -eta (eps0(c') - eps0(c_0)),
    both (B, h, w, C). concepts: those of the prompts that the batch uses, (G,), latent i belongs to the one at i mod G;
    v (G, m', d) and p (G, k, d): these prompts' rows of the state's.
    """
    c_e, template = _of_concepts(frozen.concept_emb, frozen.prompt_template, concepts)
    metrics = {}
    if config.aet.enabled:
        eps_current = beside(_predict, frozen.unet_graph, theta, frozen.schedule, z_t, t, c_e)
    # The frozen predictions that share z_t and t go through the network together.
    pair = jnp.concatenate([networks.per_latent(emb, z_t.shape[0]) for emb in (c_e, frozen.empty_emb)])
    twice = jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t])
    both = _predict(frozen.unet_graph, frozen.unet, frozen.schedule, *twice, pair)
    eps_concept, eps_empty = jnp.split(both, 2)
    if config.prompt.enabled:
        adversary = beside(_adversary, frozen, theta, template, p, z_t, t, eps_concept, config)
    if config.aet.enabled:
        v, metrics["L_aet"] = target.update_target(
            frozen,
            v,
            z_t,
            t,
            eps_current(),
            eps_concept,
            beta=config.aet.beta,
            current_weight=config.aet.current_weight,
            remat=config.remat,
        )
        c_prime = _encode_soft(frozen.text_graph, frozen.text, frozen.target_template, v)
        eps_target = _predict(frozen.unet_graph, frozen.unet, frozen.schedule, z_t, t, c_prime)
    else:
        eps_target = eps_concept
    c_star = c_e
    if config.prompt.enabled:
        p, metrics["L_adv"], c_star = adversary()
    return v, p, c_star, eps_empty, _away(given(config.eta), eps_target, eps_empty), metrics


def _adversary(frozen: Frozen, theta, template, p, z_t, t, eps_concept, config: EraseConfig):
    """Step 3: (new p, A, c_star (G, L, D)); template: the concepts' token embeddings, (G, L, d)."""
    p, value = prompt.update_prompt(
        frozen, theta, template, p, z_t, t, eps_concept, gamma=config.prompt.gamma, remat=config.remat
    )
    return p, value, _encode_soft(frozen.text_graph, frozen.text, template, p)


def _random_words(frozen: Frozen, concepts, z_t, t, key, config: EraseConfig):
    """Random words for every latent: (their encodings (B, L, D), those with the concept among them (B, L, D), theta0's
    predictions for the words alone (B, h, w, C), what the concepts add to these (B, h, w, C)). The second is None
    without `prompt.context`, the last unless kappa moves by it (context.py)."""
    batch, concepts = z_t.shape[0], concepts if config.prompt.context else None
    how = {"batch": batch, "empty": config.preserve.empty}
    c_p = words.random_prompts(frozen.text_graph, frozen.text, frozen.vocabulary, key, concepts, **how)
    predict = partial(_predict, frozen.unet_graph, frozen.unet, frozen.schedule)
    c_words, c_joined = jnp.split(c_p, 2) if config.prompt.context else (c_p, None)
    if not config.moves_kappa:
        return c_words, c_joined, predict(z_t, t, c_words), None
    eps_p, eps_joined = jnp.split(predict(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), c_p), 2)
    return c_words, c_joined, eps_p, eps_joined - eps_p


@partial(jax.jit, static_argnames=("n", "batch"))
def _dealt(step, n: int, batch: int):
    """Round-robin (method.md section 7): latent i of a step belongs to concept, or prompt, (step * batch + i) mod n.

    Returns the step's G = min(n, batch) concepts or prompts, (G,), of which latent i has the one at i mod G, and how
    many steps each has had before, (G,). Dealt by K concepts and by P K prompts, a latent's concept is the same.
    """
    first = step * batch + jnp.arange(min(n, batch))  # each one's first latent, counted over the run
    return first % n, jnp.minimum(first // n, step)


def erase_step(state: State, frozen: Frozen, config: EraseConfig) -> tuple[State, dict]:
    """One training step: (new state, metrics as float32 scalars). The old state's buffers are donated: do not reuse it.

    The latents of a batch are dealt round-robin to the adversarial prompts of all concepts. A prompt without a latent
    in this step keeps its soft tokens. With `prompt.context` every other latent of a prompt is erased from the concept
    among random words instead, and L_e is the mean over both kinds.

    Metrics: L_aet, L_adv (where enabled; means over the batch's prompts), L_e, L_p (where preserved), L_r,
    conflict_share (of tensors), mean_cosine (of g_e, which is here the gradient of L_e + weight L_p, and g_r), omega
    (mean, where there are several), update_dot_gr (<update, g_r>), drift_norm (||theta - theta0||), s (denoising steps
    done), t (mean); with `prompt.context_rate` left_in_context (the share, context.py), kappa (mean, after the step).
    """
    concepts, visits = _dealt(state.step, frozen.concept_emb.shape[0], config.batch)
    prompts, _ = _dealt(state.step, state.p.shape[0], config.batch)
    theta = trainable.add_drift(frozen.unet, state.drift, config.trainable, placement=frozen.placement)
    key, _ = _keys(given(config.seed, jnp.uint32), state.step)
    draw = {"key": key, "batch": config.batch, "config": config.latents}
    if config.latents.refresh_every == 1:
        c_e, _ = _of_concepts(frozen.concept_emb, frozen.prompt_template, concepts)
        z_t, t, s = latents_lib.fresh(frozen, theta, c_e, **draw)
        buffer = None
    else:
        z_t, t, s, buffer = latents_lib.buffered(frozen, theta, state.latents, concepts, visits, **draw)
    state, metrics = step_at(state, frozen, theta, prompts, z_t, t, config)
    metrics |= {"s": _mean(s), "t": _mean(t)}
    return dataclasses.replace(state, latents=buffer), metrics


def step_at(state: State, frozen: Frozen, theta, prompts, z_t, t, config: EraseConfig) -> tuple[State, dict]:
    """`erase_step` from given latents z_t (B, h, w, C) and timesteps t (B,) on; theta = theta0 + drift.

    prompts: the rows of the state's v and p that the batch uses, (G,), latent i belongs to the one at i mod G. The
    state's buffer of latents is passed through.
    """
    concepts = _concepts_of(prompts, count=frozen.concept_emb.shape[0])
    if config.draws_words:
        _, key = _keys(given(config.seed, jnp.uint32), state.step)
        random_words = beside(_random_words, frozen, concepts, z_t, t, key, config)
    v, p, c_star, eps_empty, push, metrics = _core(
        frozen, theta, concepts, z_t, t, *_soft_tokens(state.v, state.p, prompts), config
    )
    preserved = None
    if config.draws_words:
        c_p, c_joined, eps_p, added = random_words()
        if config.prompt.context:
            away = (state.kappa, added) if config.moves_kappa else None
            c_star, eps_empty, inside = context.goal_in_context(
                state.step, prompts, len(state.p), c_star, c_joined, eps_empty, eps_p, away
            )
        if config.preserve.weight:
            preserved = given(config.preserve.weight), c_p, eps_p
    drift, opt_state, omega, previous, eps, update_metrics = _erase_update(
        frozen,
        theta,
        state.drift,
        state.opt_state,
        state.omega,
        state.previous,
        z_t,
        t,
        c_star,
        eps_empty + push,
        preserved,
        given(config.learning_rate),
        trainable_set=config.trainable,
        grp=config.grp,
        remat=config.remat,
    )
    kappa = state.kappa
    if config.moves_kappa:
        rate = context.rate_now(state.step, given(config.prompt.context_rate), steps=config.steps)
        kappa, left = context.next_kappa(kappa, prompts, inside, eps, eps_p, added, rate)
        metrics |= {"left_in_context": left, "kappa": _mean(kappa)}
    step, all_v, all_p = _advanced(state.step, state.v, state.p, prompts, v, p)
    state = State(
        step=step,
        drift=drift,
        opt_state=opt_state,
        v=all_v,
        p=all_p,
        omega=omega,
        previous=previous,
        kappa=kappa,
        latents=state.latents,
    )
    return state, metrics | update_metrics


def explicit_step(
    original, current, concept: str, *, z_t, t, v, p, omega, eta, beta, gamma, current_weight: float = 1.0
) -> dict:
    """Steps 2 to 5 of method.md once, with no randomness, by the code that training runs.

    Args:
      original, current: pipelines that differ in the UNet's parameters only; computed in float32.
      concept: the concept's text.
      z_t: (B, h, w, C), t: (B,); v: (m', d) and p: (k, d), soft tokens shared over the batch.
      omega, eta, beta, gamma, current_weight: method.md section 3.

    Returns a dict: "v", "p" after their step; "L_aet", "L_adv" before it and "L_e" after it; and, keyed by diffusers
    key, "grads" (g_e, the gradient of L_e), "rectified" (g), both in PyTorch's layout, "lambdas" and "cosines".
    """
    config = EraseConfig(
        eta=eta,
        aet=dataclasses.replace(EraseConfig.aet, tokens=len(v), beta=beta, current_weight=current_weight),
        prompt=dataclasses.replace(EraseConfig.prompt, tokens=len(p), gamma=gamma),
        compute_dtype="float32",
    )
    frozen = freeze(original, [concept], config)
    theta = _as_float32(current.unet.params)
    drift = groups.stack(flatten(jax.tree.map(jnp.subtract, theta, frozen.unet)))
    z_t, v, p = (jnp.asarray(x, jnp.float32) for x in (z_t, v, p))
    t = jnp.asarray(t, jnp.int32)
    v, p, c_star, eps_empty, push, metrics = _core(frozen, theta, jnp.array([0]), z_t, t, v[None], p[None], config)
    goal = eps_empty + push
    losses, _, gradients = _gradients(frozen, theta, z_t, t, c_star, goal, None, trainable_set="full", remat=False)
    g, lambdas, cosines = _retain(gradients, drift, jnp.float32(omega), grp=GRPConfig())
    by_key = partial(_by_diffusers_key, like=flatten(theta))
    return {
        "v": v[0],
        "p": p[0],
        **metrics,
        **losses,
        "grads": by_key(gradients),
        "rectified": by_key(g),
        "lambdas": by_key(lambdas),
        "cosines": by_key(cosines),
    }


_gradients = jax.jit(_erasure_gradients, static_argnames=("trainable_set", "remat"))
_retain = jax.jit(rectify.retain, static_argnames="grp")


def _by_diffusers_key(stacked: dict, like: dict) -> dict:
    return {torch_key(path): to_torch(path, x) for path, x in groups.unstack(stacked, like).items()}
