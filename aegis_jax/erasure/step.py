"""The door for checks from outside: one step with every random draw given."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.erasure import groups
from aegis_jax.erasure.aegis import rectify
from aegis_jax.erasure.aegis.config import EraseConfig, GRPConfig, SoftConfig
from aegis_jax.erasure.aegis.setup import freeze
from aegis_jax.erasure.aegis.step import goal_of, gradients_of, moved_p, moved_v, predicted, prompts_of
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.programs import given
from aegis_jax.errors import AegisError
from aegis_jax.models.layout import from_torch, to_torch, torch_key
from aegis_jax.models.model import flatten

_gradients = jax.jit(gradients_of, static_argnames=("trainable_set", "remat"))
_retain = jax.jit(rectify.retain, static_argnames="grp")


def explicit_step(
    original, current, concept: str, *, attack, loss, v, p, omega, before=None, eta, beta, gamma, mu, cap
) -> dict:
    """Steps 2 to 5 of docs/method.md once, with no randomness, by the code that training runs, in float32.

    Args:
      original, current: pipelines that differ in the UNet's parameters only: theta0 and theta.
      concept: the concept's text.
      attack: (z_a (B, h, w, C), t_a (B,)), what v and p are moved at; loss: (z_b, t_b), what the loss is taken at.
      v (m', d), p (k, d): soft tokens, shared over the batch.
      omega: projection strength before its move, a number or a dict by diffusers key.
      before: P of the step before by diffusers key, in PyTorch's layout; None: 0.
      eta, beta, gamma, mu, cap: numbers.

    Returns a dict: "v", "p" after their step; "L_aet", "L_adv" before it and "L_e" after it; and, by diffusers key,
    "grads" (g_e), "projection" (P) and "rectified" (g) in PyTorch's layout, "omega" (after its move) and "cosines".
    Raises `AegisError` for a concept that does not fit, and for keys that the UNet does not have.
    """
    config = EraseConfig(eta=eta, soft=SoftConfig(beta=beta, gamma=gamma), compute_dtype="float32")
    attack, loss = (Noised(jnp.asarray(z, jnp.float32), jnp.asarray(t, jnp.int32)) for z, t in (attack, loss))
    v, p = (jnp.asarray(x, jnp.float32)[None] for x in (v, p))
    frozen = freeze(original, [concept], config, slots=(v.shape[1], p.shape[1]))
    theta = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), current.unet.params)
    tensors = flatten(theta)
    drift = groups.stack(flatten(jax.tree.map(jnp.subtract, theta, frozen.unet)))
    concepts = jnp.zeros(1, jnp.int32)
    eps_original = predicted(frozen, frozen.unet, attack, frozen.concept_emb)
    p, L_adv = moved_p(frozen, theta, concepts, attack, p, eps_original, config)
    v, L_aet = moved_v(frozen, theta, concepts, attack, v, eps_original, config)
    goal, push = goal_of(frozen, loss, *prompts_of(frozen, concepts, v, p, config), given(eta))
    goal = type(goal)(goal.cond, goal.eps + push)
    losses, _, gradients = _gradients(frozen, theta, loss, goal, None, 0.0, trainable_set="full", remat=False)
    omega = _stacked(omega, tensors, "omega", lambda path, x: x)
    before = jax.tree.map(jnp.zeros_like, drift) if before is None else _stacked(before, tensors, "before", from_torch)
    g, found = _retain(gradients, drift, omega, before, grp=GRPConfig(rule="released", mu=mu, cap=cap))
    by_key = partial(_by_diffusers_key, like=tensors)
    return {
        "v": v[0],
        "p": p[0],
        "L_aet": L_aet,
        "L_adv": L_adv,
        **losses,
        "grads": by_key(gradients),
        "projection": by_key(found.projection),
        "omega": by_key(found.omega),
        "rectified": by_key(g),
        "cosines": by_key(found.cosine),
    }


def _stacked(values, tensors: dict, name: str, convert) -> dict:
    """A number for all tensors, or a dict by diffusers key, as {group: (n, ...)}."""
    keys = {path: torch_key(path) for path in tensors}
    if not isinstance(values, dict):
        values = dict.fromkeys(keys.values(), values)
    if set(values) != set(keys.values()):
        wrong = sorted(set(values) ^ set(keys.values()))
        raise AegisError(f"{name}: keys differ from the UNet's in {', '.join(wrong[:5])}; give one per tensor")
    return groups.stack(
        {path: convert(path, np.asarray(values[key], np.float32)) for path, key in keys.items()}, tensors
    )


def _by_diffusers_key(stacked: dict, like: dict) -> dict:
    flat = groups.unstack(stacked, like)
    return {torch_key(path): to_torch(path, x) if x.ndim else x for path, x in flat.items()}
