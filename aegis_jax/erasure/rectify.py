"""GRP: parameter regularisation (PR) with directional gradient rectification (DGR); method.md 3.5 and 3.6.

PR's gradient is g_r = theta - theta0, the drift itself: it costs no backward pass and no data. DGR uses it only where
it conflicts with the erasure gradient, tensor by tensor or, with `grp.scope="tree"`, in all of them as one vector.

`rectify` is the rule. The functions below it take stacked trees (groups.py), {group: (n, *shape)}, and give per-tensor
scalars as {group: (n,)}; omega is a scalar, or such a tree with `grp.omega_per_tensor`.
"""

from functools import reduce

import jax
import jax.numpy as jnp

from aegis_jax.erasure.config import GRPConfig


def _unit_scale(tree):
    """x / max|x| and max|x| (1 if x is zero), x a tensor or a tree taken as one vector: squares and products of the
    result neither overflow nor vanish."""
    scale = reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)])
    scale = jnp.where(scale > 0, scale, 1.0)
    return jax.tree.map(lambda x: x / scale, tree), scale


def _ratio(a, b):
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def rectify(g_e, g_r, omega):
    """Removes the share `omega` of the erasure gradient's conflict with retention (method.md 3.5).

    g_e, g_r: one tensor of any shape, or trees of tensors that are taken as one vector; omega: scalar.

    In conflict (<g_e, g_r> < 0): lambda = -omega <g_e, g_r> / ||g_r||^2 and g = g_e + lambda g_r; otherwise lambda = 0
    and g is g_e bit for bit. A zero g_r gives lambda = 0.

    Returns (g like g_e, lambda, cosine of g_e and g_r), float32.
    """
    g_e, g_r = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (g_e, g_r))
    e, e_scale = _unit_scale(g_e)
    r, r_scale = _unit_scale(g_r)
    dot, ee, rr = tree_dot(e, r), tree_dot(e, e), tree_dot(r, r)
    conflict = dot < 0
    strength = jnp.where(conflict, -omega * _ratio(dot, rr), 0.0)  # in units of e_scale / r_scale
    g = jax.tree.map(lambda g_e, r: jnp.where(conflict, g_e + e_scale * (strength * r), g_e), g_e, r)
    # In this order: the ratio of the scales alone may overflow where strength is 0.
    return g, strength * e_scale / r_scale, _ratio(dot, jnp.sqrt(ee) * jnp.sqrt(rr))


def _rectified(gradients: dict, drift: dict, omega, grp: GRPConfig):
    """`rectify` in the configured scope: ({group: g}, {group: lambda (n,)}, {group: cosine (n,)}).

    A whole tree's lambda and cosine are given for each of its tensors.
    """
    if grp.scope == "tree":
        g, *scalars = rectify(gradients, drift, omega)
        return g, *({name: jnp.full(len(d), x) for name, d in drift.items()} for x in scalars)
    g, lambdas, cosines = {}, {}, {}
    for name, g_e in gradients.items():
        own = omega[name] if isinstance(omega, dict) else jnp.full(len(g_e), omega)
        g[name], lambdas[name], cosines[name] = jax.vmap(rectify)(g_e, drift[name], own)
    return g, lambdas, cosines


def retain(gradients: dict, drift: dict, omega, grp: GRPConfig):
    """What the retention mode makes of stacked gradients: ({group: g}, {group: lambda (n,)}, {group: cosine (n,)})."""
    g, lambdas, cosines = _rectified(gradients, drift, omega, grp)
    if grp.retention != "grp":
        weight = grp.weight if grp.retention == "constant" else 0.0
        lambdas = jax.tree.map(lambda x: jnp.full_like(x, weight), lambdas)
        g = {name: g_e.astype(jnp.float32) for name, g_e in gradients.items()}
        if weight:
            g = jax.tree.map(lambda g_e, d: g_e + weight * d, g, drift)
    return g, lambdas, cosines


def first_omega(drift: dict, grp: GRPConfig):
    """omega at step 0: a float32 scalar, or {group: (n,)} with `grp.omega_per_tensor`."""
    if grp.omega_per_tensor:
        return {name: jnp.full(len(d), grp.omega, jnp.float32) for name, d in drift.items()}
    return jnp.float32(grp.omega)


def projection(gradients: dict, drift: dict, grp: GRPConfig) -> dict:
    """This step's projection direction, for the next step's `next_omega`: s = -<g_e, g_r> / ||g_r||^2 per tensor (of
    the whole tree in that scope) where they conflict, else 0; and g_r itself where the next step cannot work it out
    from Adam's moments (adam.drift_before)."""
    strength = _rectified(gradients, drift, 1.0, grp)[1]
    return {"strength": strength, "drift": drift} if grp.after_adam else {"strength": strength}


def next_omega(omega, gradients: dict, drift: dict, previous: dict | None, grp: GRPConfig):
    """omega for the next step (method.md 3.6), like `omega`.

    hypergradient: the derivative of L_e + L_r with respect to the *previous* step's omega is proportional to
    <g_e + g_r, -s g_r'>, where `previous` holds that step's "drift" g_r' and "strength" s (0 at the first step): the
    sum over all tensors, or each tensor's own for an omega of its own.
    """
    if grp.omega_rule == "fixed" or grp.retention != "grp":
        return omega
    if grp.omega_rule == "linear":
        return jax.tree.map(lambda x: jnp.minimum(x + grp.mu, 1.0), omega)
    derivative = {}
    for name, g_e in gradients.items():
        total = (g_e.astype(jnp.float32) + drift[name]) * previous["drift"][name]
        derivative[name] = -previous["strength"][name] * jnp.sum(total, axis=range(1, total.ndim))
    if not grp.omega_per_tensor:
        derivative = sum(map(jnp.sum, derivative.values()))
    return jax.tree.map(lambda x, d: jnp.clip(x - grp.mu * jnp.sign(d), 0.0, 1.0), omega, derivative)


def gather(scalars: dict):
    """{group: (n,)} -> (number of tensors,)."""
    return jnp.concatenate(list(scalars.values()))


def tree_dot(a: dict, b: dict):
    """Inner product of two float32 trees."""
    return sum(jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (a, b))))
