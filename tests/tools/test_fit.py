"""The training loop: it learns, resumes to the same bytes, and stops on a non-finite loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.run.loop import NonFiniteError
from tools.world.fit import fit


def line(params, key, x, y):
    noise = 0.01 * jax.random.normal(key, y.shape)
    return ((x * params["slope"] + params["offset"] + noise - y) ** 2).mean(), {}


def points(rng):
    x = rng.normal(size=32).astype(np.float32)
    return x, 3 * x - 1


class Killed(Exception):
    pass


def killed_after(steps):
    """`points` that a run gets so often and not once more."""
    given = iter(range(steps))

    def batch(rng):
        if next(given, None) is None:
            raise Killed
        return points(rng)

    return batch


def run(folder, **options):
    start = {"slope": jnp.zeros(()), "offset": jnp.zeros(())}
    arguments = {"batch": points, "steps": 400, "learning_rate": 0.1, "seed": 3, "folder": folder}
    return fit("line", start, line, **(arguments | {"log": lambda line: None} | options))


def test_it_learns_and_leaves_no_checkpoint(tmp_path):
    trained = run(tmp_path)
    assert abs(trained["slope"] - 3) < 0.05 and abs(trained["offset"] + 1) < 0.05
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps, save_every, resumed_at", [(1, 1, 1), (399, 100, 300)])
def test_resumed_equals_uninterrupted(tmp_path, steps, save_every, resumed_at):
    whole, said = run(tmp_path), []
    with pytest.raises(Killed):
        run(tmp_path, batch=killed_after(steps), save_every=save_every)
    resumed = run(tmp_path, log=said.append)
    assert said[0] == f"line: resumed at step {resumed_at}"
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, batch=killed_after(5), save_every=5)
    with pytest.raises(AegisError, match="seed was 3, is 4"):
        run(tmp_path, seed=4)


def test_a_non_finite_loss_stops_the_run_and_names_the_step(tmp_path):
    def batch(rng):
        x, y = points(rng)
        return x, y * np.float32(np.nan if next(steps) == 7 else 1)

    steps = iter(range(1, 1000))
    with pytest.raises(NonFiniteError, match="step 7: loss is not finite"):
        run(tmp_path, steps=100, batch=batch)


def test_another_seed_gives_another_result(tmp_path):
    first, second = (run(tmp_path, steps=20, seed=seed)["slope"] for seed in (3, 4))
    assert float(first) != float(second)


def test_progress_lines(tmp_path):
    said = []
    run(tmp_path, steps=120, log=said.append)
    assert [line.split()[1] for line in said] == ["50/120", "100/120", "120/120"]
    assert all(" left" in line and "loss" in line for line in said)
