"""run/checkpoint.py: what comes back is what was saved, or a refusal that says why."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aegis_jax.erasure.aegis.state import State
from aegis_jax.errors import AegisError
from aegis_jax.run.checkpoint import Checkpoints, all_finite

IDENTITY = {"concepts": ["star"], "steps": 10, "base model": "c0ffee"}


def make_state(seed=0, width=5, kappa=True):
    """A state with everything that is awkward: integer-like names, None, an empty array."""
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    names = ["down_blocks.0.attentions.1.to_out.0.kernel", "conv_out.bias"]
    drift = {name: jax.random.normal(next(keys), (3, width)) for name in names}
    moments = optax.scale_by_adam().init(drift)
    moments = moments._replace(count=jnp.int32(seed), mu=jax.tree.map(lambda x: x / 3, drift))
    return State(
        step=jnp.int32(seed),
        drift=drift,
        opt_state=moments,
        v=jax.random.normal(next(keys), (1, 1, 4)),
        p=jnp.zeros((1, 0, 4)),
        omega={name: jnp.full(3, 0.1) for name in names},
        conflict={name: jnp.full(3, -1.0) for name in names},
        kappa=jnp.array([0.7]) if kappa else None,
        latents={},
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def open_in(folder, identity=None, keep=2):
    return Checkpoints(folder, identity or IDENTITY, keep)


@pytest.fixture
def saved(tmp_path):
    with open_in(tmp_path / "checkpoints") as checkpoints:
        for step in (4, 8, 12):
            checkpoints.save(step, make_state(step))
    return tmp_path / "checkpoints"


def test_round_trip_and_retention(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["12", "8"]
    with open_in(saved) as checkpoints:
        assert checkpoints.latest == 12
        assert_same(checkpoints.restore(make_state(1)), make_state(12))


def test_two_states_are_never_in_memory(saved, monkeypatch):
    like = make_state(1)
    with open_in(saved) as checkpoints:
        load, seen = checkpoints._orbax.load, []

        def watched(*args):
            seen.extend(leaf.is_deleted() for leaf in jax.tree.leaves(like) if leaf.size)
            return load(*args)

        monkeypatch.setattr(checkpoints._orbax, "load", watched)
        assert_same(checkpoints.restore(like), make_state(12))
    assert seen and all(seen)


def test_a_state_that_the_checkpoint_does_not_fit_is_left_alone(saved):
    like = make_state(1, width=6)
    with open_in(saved) as checkpoints, pytest.raises(AegisError, match="does not fit this run"):
        checkpoints.restore(like)
    assert_same(like, make_state(1, width=6))


def test_restored_arrays_are_bound_to_a_device_only_if_those_of_the_state_are(saved):
    bound = jax.device_put(make_state(1), jax.devices()[0])
    with open_in(saved) as checkpoints:
        for like, committed in ((make_state(1), False), (bound, True)):
            assert {leaf.committed for leaf in jax.tree.leaves(checkpoints.restore(like)) if leaf.size} == {committed}


def test_a_setting_younger_than_the_checkpoint_has_its_default(saved):
    now = IDENTITY | {"words.preserve": 0.0}
    with Checkpoints(saved, now, 2, {"words.preserve": 0.0}) as checkpoints:
        assert_same(checkpoints.restore(make_state(1)), make_state(12))
    with Checkpoints(saved, now | {"words.preserve": 3.0}, 2, {"words.preserve": 0.0}) as checkpoints:
        with pytest.raises(AegisError, match=r"words\.preserve was 0\.0, is 3\.0"):
            checkpoints.restore(make_state(1))


def test_a_part_that_a_method_may_do_without(tmp_path):
    with open_in(tmp_path / "c") as checkpoints:
        checkpoints.save(3, make_state(3, kappa=False))
        checkpoints.wait()
        assert_same(checkpoints.restore(make_state(1, kappa=False)), make_state(3, kappa=False))
        with pytest.raises(AegisError, match="kappa is missing"):
            checkpoints.restore(make_state(3))


def test_a_later_donation_does_not_reach_the_checkpoint(tmp_path):
    """Saving goes on in the background while the next step reuses the state's buffers."""
    state = {"drift": jnp.arange(2_000_000, dtype=jnp.float32)}
    wipe = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0, x), donate_argnums=0)
    with open_in(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state)
        wiped = jax.block_until_ready(wipe(state))
        checkpoints.wait()
        found = checkpoints.restore(wiped)
    np.testing.assert_array_equal(found["drift"], np.arange(2_000_000, dtype=np.float32))


def test_nothing_there(tmp_path):
    with open_in(tmp_path / "c") as checkpoints:
        assert checkpoints.latest is None


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"concepts": ["heart"]}, ["concepts was ['star'], is ['heart']"]),
        ({"base model": "decade"}, ["base model was 'c0ffee', is 'decade'"]),
        ({"steps": 11, "batch": 2}, ["steps was 10, is 11", "batch was None, is 2"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(saved, change, parts):
    with open_in(saved, IDENTITY | change) as checkpoints:
        with pytest.raises(AegisError) as error:
            checkpoints.restore(make_state())
    for part in ["12", "cannot be resumed", *parts]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_arrays_of_another_shape_are_refused(saved):
    with open_in(saved) as checkpoints:
        with pytest.raises(AegisError, match=r"drift/conv_out.bias is float32\[3, 5\], wanted"):
            checkpoints.restore(make_state(width=6))


def test_missing_and_unknown_arrays_are_refused(saved):
    like = dataclasses.replace(make_state(), latents={"loss": jnp.ones(3)}, conflict=None)
    with open_in(saved) as checkpoints:
        with pytest.raises(AegisError) as error:
            checkpoints.restore(like)
    assert "latents/loss is missing" in str(error.value)
    assert "conflict/conv_out.bias is unknown" in str(error.value)


def test_a_damaged_checkpoint_says_what_to_do(saved):
    data = saved / "12" / "state"
    for path in [*data.glob("d/*"), *data.glob("ocdbt.process_0/d/*")]:
        path.write_bytes(b"")
    with open_in(saved) as checkpoints:
        with pytest.raises(AegisError, match="12 cannot be read.*delete that folder"):
            checkpoints.restore(make_state())
    shutil.rmtree(saved / "12")  # the advice, followed
    with open_in(saved) as checkpoints:
        assert_same(checkpoints.restore(make_state()), make_state(8))


def test_what_a_killed_save_left_is_no_checkpoint(saved):
    (saved / "16.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with open_in(saved) as checkpoints:
        assert checkpoints.latest == 12
        checkpoints.save(16, make_state(16))
    with open_in(saved) as checkpoints:
        assert checkpoints.latest == 16
        assert_same(checkpoints.restore(make_state()), make_state(16))


def test_all_finite():
    good = {"a": jnp.ones(3), "n": jnp.int32(1), "b": jnp.zeros((0, 2))}
    assert all_finite(good)
    assert not all_finite(good | {"a": jnp.array([1.0, jnp.nan])})
    assert not all_finite(good | {"a": jnp.array([1.0, -jnp.inf])})


def test_runs_in_several_threads_do_not_mix_up_their_signals(tmp_path):
    """In a process of its own, whose first checkpoints all come at once."""
    script = (
        "import sys, threading, logging, pathlib\n"
        "from tests.run.test_checkpoint import make_state, open_in\n"
        "before = logging.getLogger('absl').level\n"
        "errors = []\n"
        "def work(name):\n"
        "    try:\n"
        "        with open_in(pathlib.Path(sys.argv[1]) / name) as checkpoints:\n"
        "            for step in (1, 2, 3): checkpoints.save(step, make_state(step))\n"
        "            checkpoints.wait()\n"
        "            assert int(checkpoints.restore(make_state()).step) == 3\n"
        "    except BaseException as error: errors.append(repr(error))\n"
        "threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in 'abcd']\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join(120)\n"
        "print(errors, [thread.is_alive() for thread in threads])\n"
        "log = logging.getLogger('absl')\n"
        "assert log.level == before and not log.filters\n"
        "assert not errors and not any(thread.is_alive() for thread in threads)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in "abcd":
        with open_in(tmp_path / name) as checkpoints:
            assert_same(checkpoints.restore(make_state()), make_state(3))


def test_what_went_wrong_in_the_background_is_raised_by_the_wait(tmp_path):
    with pytest.raises(OSError, match="gone"), open_in(tmp_path / "checkpoints") as checkpoints:
        save, checkpoints._orbax.save_async = checkpoints._orbax.save_async, lambda *args, **more: Failed()
        checkpoints.save(1, make_state())
        checkpoints._orbax.save_async = save
        checkpoints.wait()
    with open_in(tmp_path / "others") as checkpoints:  # nobody waits for it any more
        checkpoints.save(1, make_state(1))


class Failed:
    def result(self):
        raise OSError("the disk is gone")
