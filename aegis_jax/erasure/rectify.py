"""GRP: parameter regularisation (PR) with directional gradient rectification (DGR); method.md 3.5 and 3.6.

PR's gradient is g_r = theta - theta0, the drift itself: it costs no backward pass and no data. DGR uses it only where
it conflicts with the erasure gradient, tensor by tensor.

`rectify` is the rule for one tensor. The functions below it take stacked trees (groups.py), {group: (n, *shape)}, and
give per-tensor scalars as {group: (n,)}.
"""

import jax
import jax.numpy as jnp

from aegis_jax.erasure.config import GRPConfig


def _unit_scale(x):
    """x / max|x| and max|x| (1 if x is zero): squares and products of the result neither overflow nor vanish."""
    scale = jnp.max(jnp.abs(x), initial=0.0)
    scale = jnp.where(scale > 0, scale, 1.0)
    return x / scale, scale


def _ratio(a, b):
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def rectify(g_e, g_r, omega):
    """Removes the share `omega` of the erasure gradient's conflict with retention; one tensor of any shape.

    In conflict (<g_e, g_r> < 0): lambda = -omega <g_e, g_r> / ||g_r||^2 and g = g_e + lambda g_r; otherwise lambda = 0
    and g is g_e bit for bit. A zero g_r gives lambda = 0.

    Returns (g, lambda, cosine of g_e and g_r), float32.
    """
    g_e = g_e.astype(jnp.float32)
    e, e_scale = _unit_scale(g_e)
    r, r_scale = _unit_scale(g_r.astype(jnp.float32))
    dot, ee, rr = jnp.sum(e * r), jnp.sum(e * e), jnp.sum(r * r)
    conflict = dot < 0
    strength = jnp.where(conflict, -omega * _ratio(dot, rr), 0.0)  # in units of e_scale / r_scale
    g = jnp.where(conflict, g_e + e_scale * (strength * r), g_e)
    # In this order: the ratio of the scales alone may overflow where strength is 0.
    return g, strength * e_scale / r_scale, _ratio(dot, jnp.sqrt(ee) * jnp.sqrt(rr))


_rectify_stacked = jax.vmap(rectify, in_axes=(0, 0, None))


def retain(gradients: dict, drift: dict, omega, grp: GRPConfig):
    """What the retention mode makes of stacked gradients: ({group: g}, {group: lambda (n,)}, {group: cosine (n,)})."""
    g, lambdas, cosines = {}, {}, {}
    for name, g_e in gradients.items():
        g[name], lambdas[name], cosines[name] = _rectify_stacked(g_e, drift[name], omega)
        if grp.retention != "grp":
            weight = grp.weight if grp.retention == "constant" else 0.0
            lambdas[name] = jnp.full_like(lambdas[name], weight)
            g_e = g_e.astype(jnp.float32)
            g[name] = g_e + weight * drift[name] if weight else g_e
    return g, lambdas, cosines


def no_projection(drift: dict) -> dict:
    """What `next_omega` is told of a previous step at the first one: there was no projection."""
    return {
        "drift": jax.tree.map(jnp.zeros_like, drift),
        "strength": {name: jnp.zeros(len(d), jnp.float32) for name, d in drift.items()},
    }


def projection(gradients: dict, drift: dict) -> dict:
    """This step's projection direction, for the next step's `next_omega`: g_r and s = -<g_e, g_r> / ||g_r||^2 per
    tensor where they conflict, else 0."""
    strength = {name: _rectify_stacked(g_e, drift[name], 1.0)[1] for name, g_e in gradients.items()}
    return {"drift": drift, "strength": strength}


def next_omega(omega, gradients: dict, drift: dict, previous: dict | None, grp: GRPConfig):
    """omega for the next step (method.md 3.6).

    hypergradient: the derivative of L_e + L_r with respect to the *previous* step's omega is proportional to
    <g_e + g_r, -s g_r'>, where `previous` holds that step's g_r' and s (`projection`).
    """
    if grp.omega_rule == "fixed" or grp.retention != "grp":
        return omega
    if grp.omega_rule == "linear":
        return jnp.minimum(omega + grp.mu, 1.0)
    derivative = 0.0
    for name, g_e in gradients.items():
        total = (g_e.astype(jnp.float32) + drift[name]) * previous["drift"][name]
        derivative -= jnp.sum(previous["strength"][name] * jnp.sum(total, axis=range(1, total.ndim)))
    return jnp.clip(omega - grp.mu * jnp.sign(derivative), 0.0, 1.0)


def gather(scalars: dict):
    """{group: (n,)} -> (number of tensors,)."""
    return jnp.concatenate(list(scalars.values()))


def tree_dot(a: dict, b: dict):
    """Inner product of two float32 trees."""
    return sum(jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (a, b))))
