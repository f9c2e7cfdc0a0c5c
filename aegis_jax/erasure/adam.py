"""Adam whose moments may be kept in bfloat16: arithmetic in float32, half the memory between steps.

The variance moves by a share of 1 - b2 = 0.001 a step, less than half of bfloat16's spacing (2**-8): rounded to
nearest it would stay where it is for ever. It is rounded up or down by chance instead, so that it is right on average.
The mean moves by a tenth a step and is rounded to nearest.
"""

import math

import jax
import jax.numpy as jnp
import optax

_B1, _B2, _EPS = 0.9, 0.999, 1e-8
_adam = optax.scale_by_adam(_B1, _B2, _EPS)


def init(drift: dict, dtype) -> optax.ScaleByAdamState:
    """Moments of zero in `dtype`, like `drift`."""
    state = _adam.init(drift)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), tree)  # noqa: E731
    return state._replace(mu=zeros(state.mu), nu=zeros(state.nu))


def update(gradients: dict, state: optax.ScaleByAdamState):
    """(Adam's direction in float32, the next state in the dtype of `state`)."""
    float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    # optax raises 0.9 to the count's power: of a whole number JAX's strict dtype promotion refuses that.
    wide = state._replace(count=state.count.astype(jnp.float32), mu=float32(state.mu), nu=float32(state.nu))
    direction, new = _adam.update(gradients, wide)
    count = state.count + 1
    mu = jax.tree.map(lambda x, old: x.astype(old.dtype), new.mu, state.mu)
    nu = jax.tree.map(lambda x, old: _rounded_by_chance(x, old.dtype, count), new.nu, state.nu)
    return direction, new._replace(count=count, mu=mu, nu=nu)


def descended(drift: dict, state: optax.ScaleByAdamState, gradients: dict, learning_rate):
    """(drift after a step of Adam, its next state, the drift's norm)."""
    direction, state = update(gradients, state)
    drift = jax.tree.map(lambda d, u: d - learning_rate * u, drift, direction)
    return drift, state, jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in drift.values()))


def drift_before(drift: dict, opt_state, learning_rate):
    """The drift that the last step started from, to float32 rounding: `drift` less that step's update.

    The update is Adam's direction, which the moments of after that step still tell, so the rule for omega need
    not keep a copy of the drift. Holds for a constant learning rate; with moments in bfloat16 the update comes out to
    their 8 bits.
    """
    # Before any step the moments are 0, and so is the update. A float, as in `update`.
    count = jnp.maximum(opt_state.count, 1).astype(jnp.float32)
    mean, variance = 1 - _B1**count, 1 - _B2**count  # of the gradients: what corrects the moments' bias

    def undo(d, mu, nu):
        mu, nu = mu.astype(jnp.float32), nu.astype(jnp.float32)
        return d + learning_rate * (mu / mean) / (jnp.sqrt(nu / variance) + _EPS)

    return jax.tree.map(undo, drift, opt_state.mu, opt_state.nu)


def _rounded_by_chance(x, dtype, step):
    """float32 -> bfloat16, up with the probability of its place between the two neighbours; other dtypes: as they are.

    The chance is a hash of position and step: the same on any mesh, and a few integer operations within the pass that
    computes x, where a generator would write as many bytes as the moments hold.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_hash(x.shape, step) >> 16)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(dtype)


def _hash(shape, step):
    """Evenly distributed uint32 for every position of an array (C. Wellons' lowbias32 of a counter)."""
    position = step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        position = (position ^ (position >> shift)) * jnp.uint32(factor)
    return position ^ (position >> 16)
