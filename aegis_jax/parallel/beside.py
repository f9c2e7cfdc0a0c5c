"""Two chains of programs at once on the CPU.

JAX's CPU backend runs what one thread dispatches one program after the other, and a program of small convolutions
keeps only some of the cores busy; what another thread dispatches runs beside it. An accelerator has one queue, so
there nothing is gained. On several devices programs must start in the same order on each, or their collectives wait
for each other for ever; and what is traced belongs to the thread that traces it.
"""

import concurrent.futures
import functools
from collections.abc import Callable

import jax


def beside(like, function: Callable, *args) -> Callable:
    """Starts `function(*args)`, in another thread if `like` lies on one CPU; what is returned waits for its result.

    like: an array that the function works on. The programs and what goes into them are the same either way, so the
    results are bit-equal.
    """
    if _on_one_cpu(like) and not jax.config.jax_disable_jit:
        return _pool().submit(_as_here, jax.config.jax_default_matmul_precision, function, *args).result
    result = function(*args)
    return lambda: result


def _on_one_cpu(x) -> bool:
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return False
    devices = x.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _as_here(precision, function, *args):
    with jax.default_matmul_precision(precision):  # a context is a thread's own
        return function(*args)


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="beside")
