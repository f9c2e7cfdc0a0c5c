"""The rules for omega, and what each retention mode makes of a gradient, against float64 numpy."""

import jax
import numpy as np
import optax
import pytest

from aegis_jax.erasure import rectify
from aegis_jax.erasure.adam import drift_before
from aegis_jax.erasure.config import GRPConfig

SHAPES = {"3x4": (2, 3, 4), "5": (3, 5)}  # stacked: 2 and 3 tensors


def trees(seed, count):
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(count)]


def tensors(tree):
    """The single tensors of a stacked tree, in float64."""
    return [tensor.astype(np.float64) for name in SHAPES for tensor in np.asarray(tree[name])]


@pytest.mark.parametrize("seed", range(8))
def test_hypergradient(seed):
    """omega moves against <g_e + g_r, -s' g_r'>, s' = -<g_e', g_r'> / ||g_r'||^2 where they conflicted."""
    old_gradients, old_drift, gradients, drift = trees(seed, 4)
    previous = rectify.projection(old_gradients, old_drift, GRPConfig()) | {"drift": old_drift}
    slope = 0.0
    for old_g_e, old_g_r, g_e, g_r in zip(*map(tensors, (old_gradients, old_drift, gradients, drift)), strict=True):
        inner = np.sum(old_g_e * old_g_r)
        s = -inner / np.sum(old_g_r**2) if inner < 0 else 0.0
        slope += np.sum((g_e + g_r) * -s * old_g_r)
    omega = rectify.next_omega(np.float32(0.5), gradients, drift, previous, GRPConfig(mu=0.03))
    np.testing.assert_allclose(omega, 0.5 - 0.03 * np.sign(slope), rtol=1e-6)
    for start, sign in ((0.0, 1), (1.0, -1)):  # it stays within [0, 1]
        if np.sign(slope) == sign:
            held = rectify.next_omega(np.float32(start), gradients, drift, previous, GRPConfig(mu=0.03))
            assert held == start


def test_hypergradient_is_silent_without_a_previous_projection():
    gradients, drift = trees(0, 2)
    strength = {name: np.zeros(shape[0], np.float32) for name, shape in SHAPES.items()}
    previous = {"strength": strength, "drift": drift}
    assert rectify.next_omega(np.float32(0.25), gradients, drift, previous, GRPConfig()) == 0.25


@pytest.mark.parametrize("rate", [1e-5, 1e-3])
def test_drift_before_the_last_update(rate):
    """Adam's moments tell what the last step added: within the rounding of the drift that they are taken from."""
    adam = optax.scale_by_adam()

    @jax.jit
    def step(drift, opt_state, gradients):
        direction, opt_state = adam.update(gradients, opt_state)
        return jax.tree.map(lambda d, u: d - rate * u, drift, direction), opt_state

    before = drift = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    opt_state = adam.init(drift)
    undo = jax.jit(drift_before)
    for seed in range(12):
        told = undo(drift, opt_state, np.float32(rate))
        for name in SHAPES:
            bound = 4 * np.finfo(np.float32).eps * (np.abs(drift[name]) + rate)
            assert (np.abs(told[name] - before[name]) <= bound).all()
        # Gradients that go on in one direction, turn and fade, as in a run.
        gradients = {name: (x + 0.5) * np.float32(10.0 ** -(seed / 3)) for name, x in trees(seed, 1)[0].items()}
        before = drift
        drift, opt_state = step(drift, opt_state, gradients)
    assert all(np.abs(drift[name] - before[name]).max() > 0.1 * rate for name in SHAPES)


def test_linear_and_fixed():
    gradients, drift = trees(0, 2)
    rule = GRPConfig(omega_rule="linear", mu=0.4)
    omegas = [np.float32(0.1)]
    for _ in range(3):
        omegas.append(rectify.next_omega(omegas[-1], gradients, drift, None, rule))
    np.testing.assert_allclose(omegas, [0.1, 0.5, 0.9, 1.0], rtol=1e-6)
    fixed = GRPConfig(omega_rule="fixed", omega=0.7)
    assert rectify.next_omega(np.float32(0.7), gradients, drift, None, fixed) == np.float32(0.7)


@pytest.mark.parametrize("retention", ["grp", "constant", "none"])
def test_retention_modes(retention):
    gradients, drift = trees(1, 2)
    grp = GRPConfig(retention=retention, weight=0.3)
    g, lambdas, cosines = rectify.retain(gradients, drift, np.float32(0.6), grp)
    scalars = [[float(x) for name in SHAPES for x in np.asarray(tree[name])] for tree in (lambdas, cosines)]
    for g_e, g_r, ours, strength, cosine in zip(tensors(gradients), tensors(drift), tensors(g), *scalars, strict=True):
        inner = np.sum(g_e * g_r)
        wanted = {
            "grp": max(0.0, -0.6 * inner / np.sum(g_r**2)),  # only where they conflict
            "constant": 0.3,  # no conflict test
            "none": 0.0,
        }[retention]
        np.testing.assert_allclose(strength, wanted, 1e-5, 1e-12)
        np.testing.assert_allclose(ours, g_e + wanted * g_r, 1e-5, 1e-5)
        np.testing.assert_allclose(cosine, inner / np.linalg.norm(g_e) / np.linalg.norm(g_r), 1e-5, 1e-6)
