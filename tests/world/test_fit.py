"""The training loop: it learns, resumes to the same bytes, and stops on a non-finite loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.world.fit import fit


def line(params, key, x, y):
    noise = 0.01 * jax.random.normal(key, y.shape)
    return ((x * params["slope"] + params["offset"] + noise - y) ** 2).mean(), {}


def points(rng):
    x = rng.normal(size=32).astype(np.float32)
    return x, 3 * x - 1


def run(folder, **options):
    start = {"slope": jnp.zeros(()), "offset": jnp.zeros(())}
    arguments = {"batch": points, "steps": 400, "learning_rate": 0.1, "seed": 3, "folder": folder}
    return fit("line", start, line, log=lambda line: None, **(arguments | options))


def test_it_learns_and_leaves_no_resume_file(tmp_path):
    trained = run(tmp_path)
    assert abs(trained["slope"] - 3) < 0.05 and abs(trained["offset"] + 1) < 0.05
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop_at, save_every", [(1, 1000), (150, 1000), (399, 100)])
def test_resumed_equals_uninterrupted(tmp_path, stop_at, save_every):
    whole = run(tmp_path)
    assert run(tmp_path, stop_at=stop_at, save_every=save_every) is None
    resumed = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_a_non_finite_loss_stops_the_run_and_names_the_step(tmp_path):
    def points_with_nan(rng):
        return np.full(4, np.nan, np.float32), np.zeros(4, np.float32)

    with pytest.raises(FloatingPointError, match="line: loss is nan at step 50"):
        run(tmp_path, steps=100, batch=points_with_nan)


def test_another_seed_gives_another_result(tmp_path):
    first, second = (run(tmp_path, steps=20, seed=seed)["slope"] for seed in (3, 4))
    assert float(first) != float(second)
