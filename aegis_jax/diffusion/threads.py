"""Programs at once on a CPU.

JAX's CPU backend runs what one thread dispatches one program after the other, and a program of small convolutions
leaves some of the cores idle; what other threads dispatch runs at the same time. An accelerator has one queue, so
there nothing is gained.
"""

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

# JAX's contexts are a thread's own. These can change a result, where it lies or what is refused, so they go along.
_CONTEXTS = {
    "jax_default_device": jax.default_device,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_prng_impl": jax.default_prng_impl,
    "jax_debug_nans": jax.debug_nans,
    "jax_enable_x64": jax.enable_x64,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_threefry_partitionable": jax.threefry_partitionable,
    "jax_transfer_guard_host_to_device": jax.transfer_guard_host_to_device,
    "jax_transfer_guard_device_to_host": jax.transfer_guard_device_to_host,
}


def side_by_side(function: Callable, items: list, at_once: int) -> list:
    """[function(item) for every item], up to `at_once` of them at the same time."""
    if min(at_once, len(items)) <= 1:
        return list(map(function, items))
    contexts = _contexts()
    with ThreadPoolExecutor(min(at_once, len(items))) as pool:
        return list(pool.map(lambda item: _within(contexts, function, item), items))


def beside(function: Callable, *args) -> Callable:
    """Starts `function(*args)`, in another thread if all its arrays lie on one CPU; what is returned waits for it.

    The programs and what goes into them are the same either way, so results are bit-equal. In the caller's thread stay
    work on several devices, where programs must start in the same order on each or their collectives wait for ever,
    and what is being traced. Errors are raised by the wait, or at once by what stays.
    """
    if _on_one_cpu(args) and not jax.config.jax_disable_jit:
        return _one_thread().submit(_within, _contexts(), function, *args).result
    result = function(*args)
    return lambda: result


def _on_one_cpu(args) -> bool:
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    if not arrays or any(isinstance(x, jax.core.Tracer) for x in arrays):
        return False
    devices = {x.sharding for x in arrays}
    return len(devices) == 1 and [d.platform for d in devices.pop().device_set] == ["cpu"]


def _contexts() -> dict:
    return {name: getattr(jax.config, name) for name in _CONTEXTS}


def _within(contexts, function, *args):
    with contextlib.ExitStack() as stack:
        for name, value in contexts.items():
            stack.enter_context(_CONTEXTS[name](value))
        return function(*args)


@functools.cache
def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="beside")
