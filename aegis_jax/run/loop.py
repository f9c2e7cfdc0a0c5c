"""The loop around the step: dispatch, late metrics, checkpoints, and stopping well."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable

from aegis_jax.errors import AegisError
from aegis_jax.parallel import processes
from aegis_jax.run import checkpoint


class NonFiniteError(AegisError):
    """A loss or the state is NaN or infinite; `step` is the first step that shows it. remedy: what to change."""

    def __init__(self, step: int, what: str, remedy: str = ""):
        super().__init__(f"step {step}: {what} is not finite, the run was stopped{remedy and f'; {remedy}'}")
        self.step = step


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGINT arrived; the state after `step` steps is saved if the run has a folder."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.step = step


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only sets `signum`; a second one acts as usual.

    Outside the main thread Python allows no signal handlers, so there the process's own stay.
    """

    signum = None

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._requested)
        return self

    def _requested(self, signum, frame):
        self.signum = signum
        self._restore()

    def _restore(self):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __exit__(self, *exc):
        self._restore()


def train(
    step_fn: Callable,
    state,
    *,
    done: int,
    steps: int,
    record: Callable[[int, dict, dict, float], None],
    save: Callable[[int, object], None] | None = None,
    every: int = 100,
    remedy: str = "",
):
    """Runs `step_fn(state) -> (state, metrics)` from step `done` to `steps`; returns the state.

    record(step, metrics as floats, those per tensor as arrays, seconds) is called in order, for a
    step only after the next one has been dispatched, so the device never waits for the host.
    save(step, state) is called every `every` steps, at the end and when a signal asks to stop, and
    only with a finite state whose metrics were recorded and finite. Raises `NonFiniteError`, which gives the `remedy`,
    or `Interrupted`. Of several processes all stop after the same step if one is asked to, by SIGTERM; SIGINT acts as
    usual there.
    """
    late = _LateMetrics(record, remedy)
    stop = StopRequest()
    with contextlib.ExitStack() as signals, processes.Watchdog() as watchdog:
        for step in range(done + 1, steps + 1):
            state, metrics = step_fn(state)
            late.push(step, metrics)
            watchdog.beat()
            if processes.several():  # whose SIGTERM is JAX's: a handler of Python's would switch that off
                stop.signum = signal.SIGTERM if processes.stop_agreed(step) else None
            elif save and step == done + 1:
                # Only now: the first step may compile, Python cannot react before the compiler
                # returns, and there is nothing new to save, so a signal may end the process.
                signals.enter_context(stop)
            if step == steps or stop.signum or (save and step % every == 0):
                late.flush()
                if not checkpoint.all_finite(state):
                    raise NonFiniteError(step, "the state", remedy)
                if save:
                    save(step, state)
            if stop.signum:
                raise Interrupted(stop.signum, step)
    return state


class _LateMetrics:
    """Holds one step's metrics on the device until the next step has been dispatched."""

    def __init__(self, record, remedy: str):
        self._record, self._remedy = record, remedy
        self._pending = None
        self._clock = time.perf_counter()

    def push(self, step, metrics):
        self.flush()
        self._pending = step, metrics

    def flush(self):
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        host = processes.on_host(metrics)
        per_tensor = host.pop("per_tensor", {})
        values = {name: float(value) for name, value in host.items()}
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._record(step, values, per_tensor, seconds)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(step, ", ".join(bad), self._remedy)
