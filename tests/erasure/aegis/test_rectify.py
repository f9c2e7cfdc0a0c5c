"""DGR on one tensor: method.md's step 5 and the invariants of its section 5, against float64 numpy.

For any erasure gradient g_e, drift g_r, P of the step before and omega, over sixty orders of magnitude.
"""

import functools

import jax
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from aegis_jax.erasure.aegis import rectify
from aegis_jax.erasure.aegis.config import GRPConfig

FLOAT32 = np.finfo(np.float32)
ROUNDING = 2e-6  # of float32's sums over one small tensor, relative to the norms
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
SHAPE = (3, 7)  # one shape, so that one compiled program serves every example
PAPER, RELEASED = GRPConfig(mu=0.1, cap=1.0), GRPConfig(mu=0.2, cap=1e6)

shares = st.floats(0, 1, width=32, allow_subnormal=False)  # omega of `paper`
strengths = st.one_of(shares, st.floats(1, 1e6, width=32))  # and of `released`


@functools.partial(jax.jit, static_argnames="grp")
def program(g_e, g_r, before, omega, grp):
    projection, cosine, conflict = rectify.project(g_e, g_r)
    omega, kept = rectify.moved(omega, g_e, g_r, before, grp)
    return rectify.rectified(g_e, g_r, projection, conflict, omega, grp), projection, cosine, conflict, omega, kept


def step(g_e, g_r, omega, before=None, grp=RELEASED):
    """One step of DGR by the code under test: (g, P, cosine, sign <g_e, g_r>, omega, sign <g_e, P_before>)."""
    before = np.zeros_like(g_e) if before is None else before
    g, projection, *numbers = program(g_e, g_r, before, np.float32(omega), grp=grp)
    assert g.shape == projection.shape == g_e.shape and g.dtype == projection.dtype == np.float32
    return np.asarray(g), np.asarray(projection), *map(float, numbers)


def tensors(low=-6, high=3):
    """Random tensors of a random magnitude between 10**low and 10**high, some entries 0."""

    def draw(seed, exponent, share_of_zeros):
        rng = np.random.default_rng(seed)
        kept = rng.random(SHAPE) >= share_of_zeros
        return (rng.normal(size=SHAPE) * kept * 10.0**exponent).astype(np.float32)

    return st.builds(draw, st.integers(0, 2**32), st.floats(low, high), st.sampled_from([0.0, 0.5, 1.0]))


def full(value):
    return np.full(SHAPE, value, np.float32)


def dot(x, y):
    return np.sum(x.astype(np.float64) * y)


def norm(x):
    return np.linalg.norm(x.astype(np.float64))


def is_clear(x, y):
    """Whether float32 knows the sign of <x, y>."""
    return abs(dot(x, y)) > 1e-5 * norm(x) * norm(y)


def close(ours, wanted, scale):
    """Within float32 rounding of `scale`, which bounds the terms of the sum behind `wanted`."""
    return np.abs(np.asarray(ours, np.float64) - wanted).max() <= ROUNDING * scale + (1 + scale) * FLOAT32.tiny


def expected(g_e, g_r, omega):
    """(g, P, cosine) in float64; `omega` has been moved."""
    inner, size_e, size_r = dot(g_e, g_r), norm(g_e), norm(g_r)
    projection = inner / size_r * (g_r / size_r) if size_r > 0 else np.zeros(g_r.shape)
    cosine = inner / (size_e * size_r) if size_e > 0 and size_r > 0 else 0.0
    return g_e - omega * projection * (inner < 0), projection, cosine


def check(g_e, g_r, omega):
    g, projection, cosine, *_ = step(g_e, g_r, omega)
    wanted, wanted_projection, wanted_cosine = expected(g_e, g_r, float(np.float32(omega)))
    assert np.isfinite(g).all() and np.isfinite(projection).all()
    assert close(g, wanted, (1 + omega) * norm(g_e))
    assert close(projection, wanted_projection, norm(g_e))
    assert close(cosine, wanted_cosine, 1.0)


# --- P and g --------------------------------------------------------------------------------------


@PROPERTY
@given(tensors(), tensors(), strengths)
def test_equals_float64(g_e, g_r, omega):
    check(g_e, g_r, omega)


@PROPERTY
@given(tensors(-30, 30), tensors(-30, 30), strengths)
@example(full(1e30), full(-1e-30), 1.0)
@example(full(1e30), full(1e-30), 1.0)
@example(full(1e30), full(-1e-30), 0.0)
@example(full(1e-30), full(-1e30), 1.0)
@example(full(1e30), full(-1e30), 1e6)
@example(full(1e-30), full(-1e-30), 1e6)
def test_extreme_magnitudes(g_e, g_r, omega):
    """Norms whose squares leave float32 still give the right P and g."""
    check(g_e, g_r, omega)


@PROPERTY
@given(tensors(-30, 30), tensors(-30, 30), shares)
def test_erasure_descends_and_a_share_of_the_conflict_goes(g_e, g_r, omega):
    """With omega in [0, 1]: <g, g_e> >= 0; in conflict <g, g_r> = (1 - omega) <g_e, g_r>."""
    g, omega = step(g_e, g_r, omega)[0], float(omega)
    tiny = FLOAT32.tiny * np.sqrt(g.size)
    assert dot(g, g_e) >= -ROUNDING * norm(g_e) ** 2 - tiny * norm(g_e)
    if dot(g_e, g_r) < 0:
        error = dot(g, g_r) - (1 - omega) * dot(g_e, g_r)
        assert abs(error) <= ROUNDING * norm(g_e) * norm(g_r) + 2 * tiny * norm(g_r)


@PROPERTY
@given(tensors(), tensors(), st.floats(0, 1))
def test_erasure_descends_up_to_one_over_the_squared_cosine(g_e, g_r, share):
    """`released` lets omega pass 1: <g, g_e> >= 0 holds while omega <= 1 / cos^2, and no further."""
    assume(is_clear(g_e, g_r))
    if dot(g_e, g_r) > 0:
        g_r = -g_r
    limit = (norm(g_e) * norm(g_r) / dot(g_e, g_r)) ** 2
    assume(limit < 1e4)
    rounding = ROUNDING * (1 + limit) * norm(g_e) ** 2
    assert dot(step(g_e, g_r, share * limit)[0], g_e) >= -rounding
    assert dot(step(g_e, g_r, 1.5 * limit)[0], g_e) < -0.4 * norm(g_e) ** 2 + 2 * rounding


@PROPERTY
@given(tensors(-30, 30), tensors(-30, 30), strengths, tensors())
def test_agreement_is_left_alone_bit_for_bit(g_e, g_r, omega, before):
    """P is there all the same: the next step's omega moves by it."""
    if dot(g_e, g_r) < 0:
        g_r = -g_r
    assume(is_clear(g_e, g_r))
    g, projection, _, conflict, *_ = step(g_e, g_r, omega, before)
    assert g.tobytes() == g_e.tobytes()
    assert conflict == 1
    assert close(projection, expected(g_e, g_r, 0.0)[1], norm(g_e)) and projection.any()


@PROPERTY
@given(tensors(), tensors())
def test_omega_zero_changes_nothing(g_e, g_r):
    np.testing.assert_array_equal(step(g_e, g_r, 0.0)[0], g_e)


@PROPERTY
@given(tensors(-30, 30), strengths)
@example(full(0), 1.0)
def test_no_drift_means_no_projection(g_e, omega):
    """The first step and every untouched tensor: P is 0 and nothing is NaN."""
    g, projection, cosine, conflict, *_ = step(g_e, full(0), omega)
    assert not projection.any() and cosine == conflict == 0
    assert g.tobytes() == g_e.tobytes()


@PROPERTY
@given(tensors(-30, 30), strengths)
def test_no_gradient_means_no_projection(g_r, omega):
    g, projection, cosine, conflict, *_ = step(full(0), g_r, omega)
    assert not projection.any() and not g.any() and cosine == conflict == 0


finite = st_numpy.arrays(np.float32, SHAPE, elements=st.floats(-(2.0**99), 2.0**99, width=32))


@PROPERTY
@given(finite, finite, finite, strengths)
def test_any_finite_input_gives_finite_output(g_e, g_r, before, omega):
    """Adversarial entries: subnormals, one huge among zeros, equal and opposite."""
    g, projection, cosine, _, moved, _ = step(g_e, g_r, omega, before)
    assert np.isfinite(g).all() and np.isfinite(projection).all() and abs(cosine) <= 1 + 1e-5
    assert 0 <= moved <= 1e6
    assert norm(projection) <= 1.001 * norm(g_e) + 1e3 * FLOAT32.tiny


def test_large_tensor():
    """A tensor of SD 1.4's size: long sums stay accurate in float32."""
    rng = np.random.default_rng(0)
    g_e = rng.normal(size=(1280, 1280)).astype(np.float32)
    g_r = (rng.normal(size=g_e.shape) - 0.1 * g_e).astype(np.float32)
    g, projection, cosine, *_ = step(g_e, g_r, 1.0)
    inner = dot(g_e, g_r)
    wanted = inner / norm(g_r) ** 2 * g_r
    np.testing.assert_allclose(cosine, inner / norm(g_e) / norm(g_r), 1e-4)
    np.testing.assert_allclose(projection, wanted, 1e-4, 1e-6)
    np.testing.assert_allclose(g, g_e - wanted, 1e-4, 1e-5)


# --- omega ----------------------------------------------------------------------------------------


def after_move(omega, sign, grp):
    """clip(omega - mu sign, 0, cap), in float32."""
    return float(np.clip(np.float32(omega) - np.float32(grp.mu) * np.float32(sign), 0, np.float32(grp.cap)))


@pytest.mark.parametrize("grp", [PAPER, RELEASED], ids=["paper", "released"])
@PROPERTY
@given(tensors(-30, 30), tensors(-30, 30), tensors(-30, 30), strengths)
@example(full(1e30), full(1e30), full(1e30), 0.05)
@example(full(1e30), full(1e30), full(-1e30), 0.95)
@example(full(1e-30), full(1e-30), full(1e-30), 0.5)
@example(full(1e-30), full(1e-30), full(-1e-30), 0.5)
@example(full(1), full(1), full(0), 0.5)
def test_omega_moves_against_the_projection_before(grp, g_e, g_r, before, omega):
    """By exactly mu, by the sign of <g_e, P_before> and within [0, cap]; g uses omega after its move."""
    omega = min(omega, grp.cap)
    assume(is_clear(g_e, before) or not (g_e.any() and before.any()))
    g, _, _, _, moved, kept = step(g_e, g_r, omega, before, grp)
    assert kept == np.sign(dot(g_e, before))
    assert moved == after_move(omega, kept, grp)
    assert close(g, expected(g_e, g_r, moved)[0], (1 + moved) * norm(g_e))


@PROPERTY
@given(tensors(), tensors(), tensors(), tensors(), shares)
def test_omega_falls_while_conflict_persists_and_rises_when_it_flips(old, new, old_drift, walk, omega):
    """sign <g_e, P_before> = sign(a_now a_before), as far as the drift is that of the step before."""
    drift = (old_drift + 1e-3 * norm(old_drift) / max(norm(walk), 1e-30) * walk).astype(np.float32)
    products = dot(old, old_drift), dot(new, drift), dot(new, old_drift)
    sizes = norm(old) * norm(old_drift), norm(new) * norm(drift), norm(new) * norm(old_drift)
    assume(all(abs(a) > 2e-3 * size for a, size in zip(products, sizes, strict=True)))
    before = step(old, old_drift, omega)[1]
    moved = step(new, drift, omega, before, PAPER)[4]
    persists = (products[0] < 0) == (products[1] < 0)
    assert moved == after_move(omega, 1 if persists else -1, PAPER)


@PROPERTY
@given(tensors(), tensors(), tensors(), shares, st.floats(-6, 6))
def test_only_the_direction_of_the_projection_before_counts(g_e, g_r, before, omega, power):
    assume(is_clear(g_e, before))
    moved = {step(g_e, g_r, omega, np.float32(10**exponent) * before, PAPER)[4] for exponent in (0.0, power)}
    assert len(moved) == 1


# --- the other rules ------------------------------------------------------------------------------


@PROPERTY
@given(tensors(), tensors(), tensors(), st.sampled_from(["fixed", "constant", "none", "total"]))
def test_other_rules(g_e, g_r, before, rule):
    """fixed: omega stays; constant: g_e + lambda g_r, no conflict test; none: g_e; total: omega by L_e + L_r."""
    total = g_e + g_r
    assume(is_clear(g_e, g_r) and (rule != "total" or is_clear(total, before)))
    grp = GRPConfig(rule=rule, omega=0.3, mu=0.1, cap=1.0)
    g, _, _, _, moved, _ = step(g_e, g_r, 0.3, before, grp)
    if rule == "none":
        assert g.tobytes() == g_e.tobytes()
    elif rule == "constant":
        assert close(g, g_e + 0.3 * g_r.astype(np.float64), norm(g_e) + norm(g_r))
    else:
        sign = np.sign(dot(total, before)) if rule == "total" else 0
        assert moved == after_move(0.3, sign, grp)
        assert close(g, expected(g_e, g_r, moved)[0], (1 + moved) * norm(g_e))


# --- whole trees ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_each_tensor_has_its_own_omega(seed):
    """Stacked trees {group: (n, *shape)}: every tensor by itself, as alone."""
    rng = np.random.default_rng(seed)
    shapes = {"3x4": (2, 3, 4), "5": (3, 5)}
    gradients, drift, before = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(3)
    )
    drift["5"][0] = 0
    omega = {name: rng.uniform(0.2, 0.8, shape[0]).astype(np.float32) for name, shape in shapes.items()}
    retain = jax.jit(rectify.retain, static_argnames="grp")
    rectified, found = retain(gradients, drift, omega, before, grp=PAPER)
    for name, shape in shapes.items():
        for index in range(shape[0]):
            g_e, g_r, p_before = (tree[name][index] for tree in (gradients, drift, before))
            kept = np.sign(dot(g_e, p_before))
            moved = after_move(omega[name][index], kept, PAPER)
            wanted = expected(g_e, g_r, moved)
            assert float(found.omega[name][index]) == moved
            assert float(found.kept[name][index]) == kept
            assert float(found.conflict[name][index]) == np.sign(dot(g_e, g_r))
            for ours, value in zip((rectified, found.projection, found.cosine), wanted, strict=True):
                np.testing.assert_allclose(ours[name][index], value, 1e-5, 1e-5)
