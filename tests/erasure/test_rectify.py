"""GRP on one tensor: properties of method.md section 4 for any gradient, drift and omega, against float64 numpy."""

import jax
import numpy as np
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from aegis_jax.erasure.rectify import rectify

FLOAT32 = np.finfo(np.float32)
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
SHAPE = (3, 7)  # one shape, so that one compiled program serves every example

compiled = jax.jit(rectify)
omegas = st.floats(0, 1, width=32)


def tensors(low, high):
    """Random tensors of a random magnitude between 10**low and 10**high, some entries 0."""

    def draw(seed, exponent, share_of_zeros):
        rng = np.random.default_rng(seed)
        kept = rng.random(SHAPE) >= share_of_zeros
        return (rng.normal(size=SHAPE) * kept * 10.0**exponent).astype(np.float32)

    return st.builds(draw, st.integers(0, 2**32), st.floats(low, high), st.sampled_from([0.0, 0.5, 1.0]))


def rectified(g_e, g_r, omega):
    """(g, lambda, cosine) of the code under test, as numpy."""
    g, strength, cosine = compiled(g_e, g_r, np.float32(omega))
    assert g.shape == g_e.shape and g.dtype == np.float32
    return np.asarray(g), float(strength), float(cosine)


def expected(g_e, g_r, omega):
    """The same in float64, with lambda = cosine = 0 where a norm is 0."""
    g_e, g_r, omega = g_e.astype(np.float64), g_r.astype(np.float64), float(omega)
    inner, size_e, size_r = np.sum(g_e * g_r), np.linalg.norm(g_e), np.linalg.norm(g_r)
    strength = -omega * inner / size_r**2 if inner < 0 and size_r > 0 else 0.0
    cosine = inner / (size_e * size_r) if size_e > 0 and size_r > 0 else 0.0
    return g_e + strength * g_r, strength, cosine


def close(ours, wanted, scale):
    """Within float32 rounding of `scale`, which bounds the terms of the sum behind `wanted`."""
    return np.abs(np.asarray(ours, np.float64) - wanted).max() <= 2e-6 * scale + FLOAT32.tiny


@PROPERTY
@given(tensors(-6, 3), tensors(-6, 3), omegas)
def test_equals_float64(g_e, g_r, omega):
    g, strength, cosine = rectified(g_e, g_r, omega)
    wanted, wanted_strength, wanted_cosine = expected(g_e, g_r, omega)
    size_e, size_r = (np.linalg.norm(x.astype(np.float64)) for x in (g_e, g_r))
    assert close(g, wanted, size_e)
    assert close(cosine, wanted_cosine, 1.0)
    assert close(strength * size_r, wanted_strength * size_r, omega * size_e)


@PROPERTY
@given(tensors(-6, 3), tensors(-6, 3), omegas)
def test_descends_and_removes_a_share_of_the_conflict(g_e, g_r, omega):
    """<g, g_e> >= 0; in conflict <g, g_r> = (1 - omega) <g_e, g_r>."""
    g = rectified(g_e, g_r, omega)[0].astype(np.float64)
    g_e, g_r = g_e.astype(np.float64), g_r.astype(np.float64)
    size_e, size_r, inner = np.linalg.norm(g_e), np.linalg.norm(g_r), np.sum(g_e * g_r)
    assert np.sum(g * g_e) >= -2e-6 * size_e**2
    if inner < 0:
        assert close(np.sum(g * g_r), (1 - omega) * inner, size_e * size_r)


@PROPERTY
@given(tensors(-6, 3), tensors(-6, 3), omegas)
def test_agreement_is_left_alone_bit_for_bit(g_e, g_r, omega):
    inner = np.sum(g_e.astype(np.float64) * g_r)
    if inner < 0:
        g_r, inner = -g_r, -inner
    # At a right angle the sign of the inner product is rounding, and either answer is right.
    assume(inner == 0 or inner > 1e-5 * np.linalg.norm(g_e) * np.linalg.norm(g_r))
    g, strength, _ = rectified(g_e, g_r, omega)
    assert strength == 0
    assert g.tobytes() == g_e.tobytes()


@PROPERTY
@given(tensors(-6, 3), tensors(-6, 3))
def test_omega_zero_changes_nothing(g_e, g_r):
    g, strength, _ = rectified(g_e, g_r, 0.0)
    assert strength == 0
    np.testing.assert_array_equal(g, g_e)


@PROPERTY
@given(tensors(-20, 20), omegas)
def test_no_drift_means_no_projection(g_e, omega):
    """The first step and every untouched tensor: lambda is 0 and nothing is NaN."""
    g, strength, cosine = rectified(g_e, np.zeros(SHAPE, np.float32), omega)
    assert strength == 0 and cosine == 0
    assert g.tobytes() == g_e.tobytes()


@PROPERTY
@given(tensors(-6, 3), omegas)
def test_no_gradient_means_no_projection(g_r, omega):
    g, strength, cosine = rectified(np.zeros(SHAPE, np.float32), g_r, omega)
    assert strength == 0 and cosine == 0
    assert not g.any()


@PROPERTY
@given(tensors(-20, 20), tensors(-20, 20), omegas)
@example(np.full(SHAPE, 1e20, np.float32), np.full(SHAPE, -1e-20, np.float32), 1.0)
@example(np.full(SHAPE, 1e20, np.float32), np.full(SHAPE, 1e-20, np.float32), 1.0)
@example(np.full(SHAPE, 1e20, np.float32), np.full(SHAPE, -1e-20, np.float32), 0.0)
@example(np.full(SHAPE, 1e-20, np.float32), np.full(SHAPE, -1e20, np.float32), 1.0)
@example(np.full(SHAPE, 1e20, np.float32), np.full(SHAPE, -1e20, np.float32), 1.0)
@example(np.full(SHAPE, 1e-20, np.float32), np.full(SHAPE, -1e-20, np.float32), 1.0)
def test_extreme_magnitudes(g_e, g_r, omega):
    """Norms whose squares leave float32 still give the right g; lambda saturates where it does not fit itself."""
    g, strength, cosine = rectified(g_e, g_r, omega)
    wanted, wanted_strength, wanted_cosine = expected(g_e, g_r, omega)
    assert np.isfinite(g).all() and np.isfinite(cosine) and not np.isnan(strength)
    assert close(g, wanted, np.linalg.norm(g_e.astype(np.float64)))
    assert close(cosine, wanted_cosine, 1.0)
    if abs(wanted_strength) > FLOAT32.max:
        assert strength >= 0.99 * FLOAT32.max


@PROPERTY
@given(
    st_numpy.arrays(np.float32, SHAPE, elements=st.floats(-(2.0**66), 2.0**66, width=32)),
    st_numpy.arrays(np.float32, SHAPE, elements=st.floats(-(2.0**66), 2.0**66, width=32)),
    omegas,
)
def test_any_finite_input_gives_finite_output(g_e, g_r, omega):
    """Adversarial entries: subnormals, one huge among zeros, equal and opposite."""
    g, strength, cosine = rectified(g_e, g_r, omega)
    assert np.isfinite(g).all() and strength >= 0 and abs(cosine) <= 1 + 1e-5
    assert np.abs(g).max() <= 2.001 * np.linalg.norm(g_e.astype(np.float64)) + FLOAT32.tiny


def test_large_tensor():
    """A tensor of SD 1.4's size: long sums stay accurate in float32."""
    rng = np.random.default_rng(0)
    g_e = rng.normal(size=(1280, 1280)).astype(np.float32)
    g_r = (rng.normal(size=g_e.shape) - 0.1 * g_e).astype(np.float32)
    g, strength, cosine = rectified(g_e, g_r, 1.0)
    wanted, wanted_strength, wanted_cosine = expected(g_e, g_r, 1.0)
    np.testing.assert_allclose(strength, wanted_strength, 1e-4)
    np.testing.assert_allclose(cosine, wanted_cosine, 1e-4)
    np.testing.assert_allclose(g, wanted, 1e-4, 1e-5)
