"""GRP: parameter regularisation (PR) with directional gradient rectification (DGR); docs/method.md, step 5.

PR's gradient is g_r = theta - theta0, the drift itself: it costs no backward pass and no data. DGR uses it only where
it conflicts with the erasure gradient, tensor by tensor:

  a = <g_e, g_r>,   P = (a / ||g_r||^2) g_r,   omega <- clip(omega - mu sign <g_e, P_before>, 0, cap)
  g = g_e - omega P if a < 0, else g_e

`project`, `moved` and `rectified` are the rule for one tensor; `retain` maps them over stacked trees (groups.py),
{group: (n, *shape)}, with per-tensor numbers as {group: (n,)}.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.erasure.aegis.config import GRPConfig


@partial(
    jax.tree_util.register_dataclass, data_fields=["projection", "omega", "cosine", "conflict", "kept"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Retained:
    """What DGR found, per tensor.

    Attributes:
      projection: P, {group: (n, *shape)}.
      omega: after its move, {group: (n,)}; so are the following:
      cosine: of g_e and g_r, 0 where one of them is 0.
      conflict: sign of <g_e, g_r>.
      kept: sign of <g_e, P_before>: -1 where conflict has flipped since the step before.
    """

    projection: dict
    omega: dict
    cosine: dict
    conflict: dict
    kept: dict


def _unit_scale(x):
    """x / max|x| and max|x| (1 if x is 0): squares and products of the result neither overflow nor vanish."""
    scale = jnp.max(jnp.abs(x), initial=0.0)
    scale = jnp.where(scale > 0, scale, 1.0)
    return x / scale, scale


def _ratio(a, b):
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def project(g_e, g_r):
    """(P, cosine, sign of <g_e, g_r>) of one tensor, float32; all 0 where g_r is 0."""
    e, e_scale = _unit_scale(g_e.astype(jnp.float32))
    r, _ = _unit_scale(g_r.astype(jnp.float32))
    dot, ee, rr = jnp.sum(e * r), jnp.sum(e * e), jnp.sum(r * r)
    return e_scale * (_ratio(dot, rr) * r), _ratio(dot, jnp.sqrt(ee) * jnp.sqrt(rr)), jnp.sign(dot)


def sign_of_product(x, y):
    """sign <x, y> of one tensor."""
    return jnp.sign(jnp.sum(_unit_scale(x)[0] * _unit_scale(y)[0]))


def moved(omega, g_e, g_r, before, grp: GRPConfig):
    """(omega after its move, sign <g_e, P_before>) of one tensor; `before` is P_before or a positive multiple of it."""
    kept = sign_of_product(g_e, before)
    if grp.rule not in ("released", "total"):
        return omega, kept
    sign = kept if grp.rule == "released" else sign_of_product(g_e + g_r, before)
    return jnp.clip(omega - grp.mu * sign, 0.0, grp.cap), kept


def rectified(g_e, g_r, projection, conflict, omega, grp: GRPConfig):
    """g of one tensor: g_e bit for bit without conflict, and where the rule is none."""
    if grp.rule == "none":
        return g_e
    if grp.rule == "constant":
        return g_e + omega * g_r
    return jnp.where(conflict < 0, g_e - omega * projection, g_e)


def retain(gradients: dict, drift: dict, omega: dict, before: dict, grp: GRPConfig):
    """({group: g}, `Retained`) for stacked gradients g_e, drift g_r and P_before (or positive multiples of it)."""
    g, parts = {}, {field.name: {} for field in dataclasses.fields(Retained)}

    def one(g_e, g_r, omega, before):
        projection, cosine, conflict = project(g_e, g_r)
        omega, kept = moved(omega, g_e, g_r, before, grp)
        return rectified(g_e, g_r, projection, conflict, omega, grp), Retained(
            projection, omega, cosine, conflict, kept
        )

    for name, g_e in gradients.items():
        g_e = g_e.astype(jnp.float32)
        g[name], found = jax.vmap(one)(g_e, drift[name], omega[name], before[name])
        for part, values in parts.items():
            values[name] = getattr(found, part)
    return g, Retained(**parts)


def times(scalars: dict, tensors: dict) -> dict:
    """{group: (n,)} times {group: (n, *shape)}."""
    return {name: jax.vmap(jnp.multiply)(scalars[name], x) for name, x in tensors.items()}


def per_tensor(drift: dict, value: float) -> dict:
    """{group: (n,)} of one value, float32."""
    return {name: jnp.full(len(d), value, jnp.float32) for name, d in drift.items()}


def tree_dot(a: dict, b: dict):
    """Inner product of two float32 trees."""
    return sum(jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (a, b))))
