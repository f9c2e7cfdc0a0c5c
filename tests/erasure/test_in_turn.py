"""Latents in turn: the same figures as together, in the memory of one; on devices each has its own in every turn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aegis_jax
from aegis_jax.erasure import in_turn
from aegis_jax.erasure.aegis import step
from aegis_jax.erasure.aegis.setup import freeze
from aegis_jax.erasure.aegis.state import Goal
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.presets import preset
from tests.tiny import responsive

BATCH = 6
CONFIG = dataclasses.replace(preset("aegis+").settings, compute_dtype="float32", trainable="xattn", batch=BATCH)


def test_rows_come_back_in_order_and_sums_in_float32():
    x = jnp.arange(12, dtype=jnp.bfloat16).reshape(6, 2)
    seen = []

    def function(some):
        seen.append(some.shape)
        return {"sum": some.sum(), "peak": (some**8).sum()}, some * 2

    total, rows = in_turn.rows(function, (x,), 2)
    assert set(seen) == {(2, 2)} and total["sum"] == 66 and total["sum"].dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(rows, np.float32), 2 * np.arange(12).reshape(6, 2))
    assert in_turn.rows(lambda some: (some.sum(), some), (x,), 6)[0].dtype == jnp.bfloat16  # nothing is added


def test_a_turn_has_a_row_of_every_device():
    def function(some):
        return some.sum(), some[:, 0] - some[:, 0].min()  # how far a turn's rows lie apart

    rows = jnp.arange(8.0)[:, None]  # device d of 4 holds 2 d and 2 d + 1
    np.testing.assert_array_equal(in_turn.rows(function, (rows,), 4)[1], [0, 0, 2, 2, 4, 4, 6, 6])


@pytest.mark.parametrize(
    ("batch", "devices", "low", "wanted"), [(4, 1, True, 1), (4, 1, False, 4), (8, 4, True, 4), (8, 4, False, 8)]
)
def test_how_many_at_once(batch, devices, low, wanted):
    mesh = type("Mesh", (), {"size": devices})
    placement = type("Placement", (), {"mesh": mesh}) if devices > 1 else None
    assert in_turn.at_once(batch, placement, low) == wanted


def test_what_does_not_divide_is_no_turn():
    with pytest.raises(ValueError, match="6 rows, 4 at once"):
        in_turn.rows(lambda x: (x.sum(), x), (jnp.ones((6, 1)),), 4)


@pytest.fixture(scope="module")
def given(tiny):
    """(frozen, theta, latents, goal, preserved goal, soft tokens) with more prompts than divide the batch."""
    pipeline = responsive(aegis_jax.load_pipeline(tiny()))
    frozen = freeze(pipeline, ["star"], CONFIG, slots=(4, 4))
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    shape = (BATCH, *frozen.latent_shape)
    theta = jax.tree.map(lambda x: x + 0.01 * jnp.sign(x), frozen.unet)
    at = Noised(draw(*shape), jnp.asarray(rng.integers(1, 900, BATCH), jnp.int32))
    soft = 0.1 * draw(4, 4, frozen.prompt_template.shape[-1])
    embedding = frozen.concept_emb.embedding
    conds = [dataclasses.replace(frozen.concept_emb, embedding=embedding + 0.1 * draw(n, *embedding.shape[1:]))
             for n in (4, BATCH)]  # fmt: skip
    return frozen, theta, at, Goal(conds[0], draw(*shape)), Goal(conds[1], draw(*shape)), soft


def test_the_update_s_gradient_is_the_same_in_turn(given):
    frozen, theta, at, goal, preserve, _ = given
    of = jax.jit(functools.partial(step.gradients_of, trainable_set="xattn"), static_argnames="remat")
    together, turns = (of(frozen, theta, at, goal, preserve, 5.0, remat=remat) for remat in (False, True))
    assert set(together[0]) == set(turns[0]) == {"L_e", "L_p"}
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(turns), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)
    assert max(float(jnp.abs(x).max()) for x in turns[2].values()) > 1e-4


def test_a_sign_step_is_the_same_in_turn(given):
    frozen, theta, at, goal, preserve, soft = given
    goals, weights = jnp.stack([goal.eps, preserve.eps]), jnp.asarray([1.0, 0.5])
    template = step._rows(frozen.prompt_template, jnp.zeros(4, jnp.int32))
    args = frozen, theta, template, soft, at, goals, weights, jnp.float32(1e-3)
    (one, before), (other, after) = (step.soft.sign_step(*args, remat=remat) for remat in (False, True))
    assert float(before) == pytest.approx(float(after), rel=1e-5)
    moved = np.sign(np.asarray(one - soft)), np.sign(np.asarray(other - soft))
    assert (moved[0] != 0).all() and (moved[0] != moved[1]).mean() < 5e-3  # but where the gradient is rounding


@pytest.mark.slow
def test_a_batch_in_turn_takes_the_memory_of_one(given):
    frozen, theta, at, goal, preserve, _ = given
    of = functools.partial(step.gradients_of, trainable_set="xattn")

    def bytes_of(count, remat):
        first = lambda tree: jax.tree.map(lambda x: x[:count], tree)  # noqa: E731
        program = jax.jit(lambda *args: of(frozen, theta, *args, 5.0, remat=remat))
        kept = program.lower(first(at), first(goal), first(preserve)).compile().memory_analysis()
        return kept.temp_size_in_bytes

    one, turns, together = bytes_of(1, True), bytes_of(BATCH, True), bytes_of(BATCH, False)
    assert turns < 1.5 * one + 2**20 and together > 3 * turns
