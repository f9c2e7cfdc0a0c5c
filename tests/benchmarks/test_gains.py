import math

import jax
import jax.numpy as jnp
import numpy as np

import aegis_jax
from aegis_jax.erasure import latents
from benchmarks import gains

STARTED = latents.positions


def test_hellinger_weighs_a_latents_miss():
    scale = [("steps", "1"), ("batch", "1"), ("latents.steps", "4"), ("method", "paper"), ("picture.images", "0")]

    def first():
        return aegis_jax.erase("world", "star", config="world", overrides=scale).metrics[0]["L_e"]

    plain = first()
    with gains.applied({"gain": "hellinger"}):
        weighted = first()
    # L_e is reported of the nearer goal: the square of the weighed miss.
    assert plain > 1e-4
    np.testing.assert_allclose(weighted, plain * math.exp(-2 * gains.C * plain), rtol=1e-4)


def test_nearer_goals_give_the_weighed_gradient():
    rng = np.random.default_rng(0)
    eps, goal = (jnp.asarray(rng.normal(size=(3, 2, 2, 4)) * 0.1, jnp.float32) for _ in range(2))
    fixed = gains.nearer(eps, goal)
    found = jax.grad(lambda e: jnp.mean(jnp.square(e - fixed)))(eps)
    mse = np.mean(np.square(np.asarray(eps - goal, np.float64)), (1, 2, 3), keepdims=True)
    wanted = np.exp(-gains.C * mse) * 2 * np.asarray(eps - goal, np.float64) / eps.size
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_late_leaves_the_noisiest_steps_out():
    found = gains.drawn_by(np.asarray([0, 0, 1, 3], np.float32))(jax.random.key(0), (4000,), 4, "interval")
    count = np.bincount(np.asarray(found), minlength=4)
    assert count[:2].sum() == 0 and abs(count[3] / 4000 - 0.75) < 0.03
    cell = gains.grid(["late"], ["star"])[0]
    odds = gains.odds(cell)
    assert odds.shape == (50,) and list(odds[:6]) == [0, 0, 0, 0, 0, 1]


def test_the_step_is_as_it_was_afterwards():
    with gains.applied(gains.grid(["late"], ["star"])[0]):
        assert latents.positions is not STARTED
    assert latents.positions is STARTED
