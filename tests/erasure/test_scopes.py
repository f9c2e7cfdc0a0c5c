"""GRP over whole trees and with one omega per tensor: section 4's properties, against float64 numpy."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from aegis_jax.erasure import rectify
from aegis_jax.erasure.config import EraseConfig, GRPConfig, check
from aegis_jax.errors import AegisError
from aegis_jax.run import config as run_config

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
SHAPES = {"3x4": (2, 3, 4), "5": (3, 5)}  # stacked: 2 and 3 tensors
TREE, PER_TENSOR = GRPConfig(scope="tree"), GRPConfig(omega_per_tensor=True)
TINY = np.finfo(np.float32).tiny

compiled = jax.jit(rectify.retain, static_argnames="grp")
omegas = st.floats(0, 1, width=32)


def trees(low, high):
    """Trees whose groups have magnitudes of their own between 10**low and 10**high, one tensor perhaps 0."""

    def draw(seed, exponents, silent):
        rng = np.random.default_rng(seed)
        tree = {name: rng.normal(size=SHAPES[name]) * 10.0**e for name, e in zip(SHAPES, exponents, strict=True)}
        tree["5"][0] *= not silent
        return {name: x.astype(np.float32) for name, x in tree.items()}

    return st.builds(draw, st.integers(0, 2**32), st.tuples(*[st.floats(low, high)] * len(SHAPES)), st.booleans())


per_tensor_omegas = st.builds(
    lambda seed: {name: np.random.default_rng(seed).random(len(x), np.float32) for name, x in zeros().items()},
    st.integers(0, 2**32),
)


def zeros():
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def tensors(tree):
    """The single tensors, or the tensors' scalars, in float64."""
    return [np.float64(tensor) for name in SHAPES for tensor in np.asarray(tree[name])]


def vector(tree):
    return np.concatenate([tensor.ravel() for tensor in tensors(tree)])


def expected(g_e, g_r, omega):
    """(g, lambda, cosine) of one vector in float64; lambda = cosine = 0 where a norm is 0."""
    inner, size_e, size_r = np.sum(g_e * g_r), np.linalg.norm(g_e), np.linalg.norm(g_r)
    strength = -float(omega) * inner / size_r**2 if inner < 0 and size_r > 0 else 0.0
    return g_e + strength * g_r, strength, inner / (size_e * size_r) if size_e > 0 and size_r > 0 else 0.0


def close(ours, wanted, scale):
    return np.abs(np.float64(ours) - wanted).max() <= 2e-6 * scale + TINY


def bits(tree):
    return [np.asarray(tree[name]).tobytes() for name in SHAPES]


@PROPERTY
@given(trees(-6, 3), trees(-6, 3), omegas)
def test_tree_is_one_vector(g_e, g_r, omega):
    """One lambda and one cosine, those of all tensors together; erasure descends, a share of the conflict goes."""
    g, lambdas, cosines = compiled(g_e, g_r, np.float32(omega), grp=TREE)
    e, r = vector(g_e), vector(g_r)
    wanted, strength, cosine = expected(e, r, omega)
    size_e, size_r = np.linalg.norm(e), np.linalg.norm(r)
    assert close(vector(g), wanted, size_e)
    assert len(set(tensors(lambdas))) == len(set(tensors(cosines))) == 1
    assert close(tensors(lambdas)[0] * size_r, strength * size_r, omega * size_e)
    assert close(tensors(cosines)[0], cosine, 1.0)
    assert vector(g) @ e >= -2e-6 * size_e**2
    if e @ r < 0:
        assert close(vector(g) @ r, (1 - omega) * (e @ r), size_e * size_r)


@PROPERTY
@given(trees(-6, 3), trees(-6, 3), omegas)
def test_tree_without_conflict_is_left_alone_bit_for_bit(g_e, g_r, omega):
    """Also in tensors that conflict by themselves."""
    e, r = vector(g_e), vector(g_r)
    if e @ r < 0:
        g_r = {name: -x for name, x in g_r.items()}
    assume(abs(e @ r) > 1e-5 * np.linalg.norm(e) * np.linalg.norm(r))  # else the sign is rounding
    g, lambdas, _ = compiled(g_e, g_r, np.float32(omega), grp=TREE)
    assert not np.any(tensors(lambdas))
    assert bits(g) == bits(g_e)


@PROPERTY
@given(trees(-6, 3), trees(-6, 3), per_tensor_omegas)
def test_each_tensor_has_its_own_omega(g_e, g_r, omega):
    g, lambdas, cosines = compiled(g_e, g_r, omega, grp=PER_TENSOR)
    for e, r, share, ours, strength, cosine in zip(*map(tensors, (g_e, g_r, omega, g, lambdas, cosines)), strict=True):
        size_e, size_r, inner = np.linalg.norm(e), np.linalg.norm(r), np.sum(e * r)
        wanted, wanted_strength, wanted_cosine = expected(e, r, share)
        assert close(ours, wanted, size_e) and close(cosine, wanted_cosine, 1.0)
        assert close(strength * size_r, wanted_strength * size_r, share * size_e)
        assert np.sum(ours * e) >= -2e-6 * size_e**2
        if inner < 0:
            assert close(np.sum(ours * r), (1 - share) * inner, size_e * size_r)
        elif inner > 1e-5 * size_e * size_r:
            assert strength == 0 and ours.tobytes() == e.tobytes()


@PROPERTY
@given(trees(-20, 20), omegas)
def test_no_drift_means_no_projection(g_e, omega):
    each = {name: np.full(len(x), omega, np.float32) for name, x in g_e.items()}
    for grp, share in ((TREE, np.float32(omega)), (PER_TENSOR, each)):
        g, lambdas, cosines = compiled(g_e, zeros(), share, grp=grp)
        assert not np.any(tensors(lambdas)) and not np.any(tensors(cosines))
        assert bits(g) == bits(g_e)


def scaled(e, r):
    return tuple({"3x4": np.full((2, 3, 4), x, np.float32), "5": np.full((3, 5), y, np.float32)} for x, y in (e, r))


@PROPERTY
@given(st.tuples(trees(-20, 20), trees(-20, 20)), omegas)
@example(scaled((1e20, 1e-20), (-1e-20, -1e20)), 1.0)
@example(scaled((1e20, 1e-20), (-1e20, 1e-20)), 0.5)
@example(scaled((1e-20, 1e-20), (-1e-20, -1e-20)), 1.0)
@example(scaled((1e-20, 0), (-1e20, 1e20)), 1.0)
def test_tree_of_extreme_magnitudes(pair, omega):
    """Norms whose squares leave float32, and tensors of very different sizes, still give the right g."""
    g_e, g_r = pair
    g, lambdas, cosines = compiled(g_e, g_r, np.float32(omega), grp=TREE)
    e, r = vector(g_e), vector(g_r)
    assert np.isfinite(vector(g)).all() and not np.isnan(tensors(lambdas)).any()
    assert close(vector(g), expected(e, r, omega)[0], np.linalg.norm(e))
    assert close(tensors(cosines)[0], expected(e, r, omega)[2], 1.0)


@functools.partial(jax.jit, static_argnames="grp")
def two_steps_of_omega(old, old_drift, new, drift, *, grp):
    previous = rectify.projection(old, old_drift, grp) | {"drift": old_drift}
    return rectify.next_omega(rectify.first_omega(drift, grp), new, drift, previous, grp)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("grp", [TREE, PER_TENSOR], ids=["tree", "per tensor"])
def test_hypergradient(grp, seed):
    """One sign for the tree, from the tree's own s; one for each tensor with an omega of its own."""
    rng = np.random.default_rng(seed)
    grp = dataclasses.replace(grp, omega=0.5, mu=0.03)
    old, old_drift, new, drift = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(4)
    )
    omega = two_steps_of_omega(old, old_drift, new, drift, grp=grp)

    def slope(old, old_drift, new, drift):
        return -expected(old, old_drift, 1.0)[1] * np.sum((new + drift) * old_drift)

    split = vector if grp.scope == "tree" else tensors
    parts = [split(tree) for tree in (old, old_drift, new, drift)]
    slopes = [slope(*parts)] if grp.scope == "tree" else [slope(*each) for each in zip(*parts, strict=True)]
    ours = [omega] if grp.scope == "tree" else tensors(omega)
    np.testing.assert_allclose(ours, 0.5 - 0.03 * np.sign(slopes), rtol=1e-6)


def test_linear_moves_every_omega():
    rule = GRPConfig(omega_rule="linear", mu=0.4, omega=0.7, omega_per_tensor=True)
    omega = rectify.next_omega(rectify.first_omega(zeros(), rule), zeros(), zeros(), None, rule)
    assert tensors(omega) == [1.0] * 5


def test_config():
    """Both are settings of a run; together they make no sense and are refused with the reason."""
    run = functools.partial(run_config.load, None)
    assert run([("grp.scope", "tree")]).erase.grp == TREE
    assert run([("grp.omega_per_tensor", "true")]).erase.grp == PER_TENSOR
    with pytest.raises(AegisError, match=r"grp.omega_per_tensor=True .want false with grp.scope=.tree., which has one"):
        run([("grp.scope", "tree"), ("grp.omega_per_tensor", "true")])
    with pytest.raises(AegisError, match=r"grp.scope='layer' .want tensor \| tree"):
        check(EraseConfig(grp=GRPConfig(scope="layer")))
