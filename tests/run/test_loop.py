"""run/loop.py: the order of dispatch and record, and the ways to stop."""

import os
import signal

import jax.numpy as jnp
import pytest

from aegis_jax.run import loop


def steps_of(events, values):
    """A step function that counts, logs its dispatch and gives `values[step]` as loss."""

    def step_fn(state):
        step = int(state) + 1
        events.append(f"dispatch {step}")
        return state + 1, {"L_e": jnp.float32(values.get(step, 1.0))}

    return step_fn


def run(events, values=None, *, done=0, steps=6, every=3, step_fn=None):
    return loop.train(
        step_fn or steps_of(events, values or {}),
        jnp.float32(done),
        done=done,
        steps=steps,
        every=every,
        record=lambda step, metrics, per_tensor, seconds: events.append(f"record {step}"),
        save=lambda step, state: events.append(f"save {step} {int(state)}"),
    )


def test_metrics_are_fetched_one_step_late():
    events = []
    assert int(run(events, steps=4)) == 4
    assert events == [
        "dispatch 1", "dispatch 2", "record 1", "dispatch 3", "record 2", "record 3", "save 3 3",
        "dispatch 4", "record 4", "save 4 4",
    ]  # fmt: skip


def test_goes_on_from_a_step():
    events = []
    assert int(run(events, done=4, steps=6)) == 6
    assert events[0] == "dispatch 5" and events[-1] == "save 6 6"
    assert [e for e in events if e.startswith("save")] == ["save 6 6"]


def test_nothing_left_to_do():
    events = []
    assert int(run(events, done=6, steps=6)) == 6
    assert events == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_loss_that_is_not_finite_stops_the_run(bad, step):
    events = []
    with pytest.raises(loop.NonFiniteError, match=f"step {step}: L_e") as error:
        run(events, {step: bad})
    assert error.value.step == step
    saved = [e for e in events if e.startswith("save")]
    assert saved == [f"save {s} {s}" for s in (3, 6) if s < step]


def test_a_state_that_is_not_finite_is_never_saved():
    """The loss of a step is that of the state before it: the state may break with a good loss."""
    events = []

    def step_fn(state):
        return jnp.where(state == 5, jnp.nan, state + 1), {"L_e": jnp.float32(1)}

    with pytest.raises(loop.NonFiniteError, match="step 6: the state"):
        run(events, step_fn=step_fn)
    assert [e for e in events if e.startswith("save")] == ["save 3 3"]


def test_a_run_without_folder_checks_its_result():
    with pytest.raises(loop.NonFiniteError, match="step 2"):
        loop.train(
            lambda state: (state * jnp.nan, {}), jnp.float32(1), done=0, steps=2,
            record=lambda *args: None,
        )  # fmt: skip


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(signum):
    events = []
    count = steps_of(events, {})

    def step_fn(state):
        if int(state) == 1:
            os.kill(os.getpid(), signum)
        return count(state)

    before = signal.getsignal(signum)
    with pytest.raises(loop.Interrupted) as stopped:
        run(events, step_fn=step_fn)
    assert (stopped.value.signum, stopped.value.step) == (signum, 2)
    assert events[-1] == "save 2 2" and "record 2" in events
    assert signal.getsignal(signum) is before


def test_a_second_signal_acts_as_usual():
    def step_fn(state):
        if int(state) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return state + 1, {}

    with pytest.raises(KeyboardInterrupt) as stopped:
        run([], step_fn=step_fn)
    assert not isinstance(stopped.value, loop.Interrupted)


def test_the_first_step_can_be_interrupted():
    """It compiles, which may take minutes; there is nothing to save yet."""

    def step_fn(state):
        os.kill(os.getpid(), signal.SIGINT)
        return state + 1, {}

    events = []
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(events, step_fn=step_fn)
    assert not isinstance(stopped.value, loop.Interrupted) and events == []
