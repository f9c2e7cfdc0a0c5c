"""Programs at once on a CPU, and how many of its cores this process may use.

JAX's CPU backend runs what one thread dispatches one program after the other, and a program of small convolutions
leaves some of the cores idle; what other threads dispatch runs at the same time. An accelerator has one queue, so
there nothing is gained.
"""

import contextlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

# JAX's contexts are a thread's own. These can change a result, where it lies or what is refused, so they go along.
_CONTEXTS = {
    "jax_default_device": jax.default_device,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_default_prng_impl": jax.default_prng_impl,
    "jax_debug_nans": jax.debug_nans,
    "jax_enable_x64": jax.enable_x64,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_numpy_rank_promotion": jax.numpy_rank_promotion,
    "jax_threefry_partitionable": jax.threefry_partitionable,
    "jax_transfer_guard_host_to_device": jax.transfer_guard_host_to_device,
    "jax_transfer_guard_device_to_host": jax.transfer_guard_device_to_host,
}


def cores(root: Path = Path("/")) -> int:
    """How many CPU cores this process may use: of the host's those of its affinity, bounded by its cgroups' quota.

    root: where proc/ and sys/ lie.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(root))))


def _quota(root: Path) -> float:
    """Cores that Linux's cgroups (v2 and v1) grant this process; infinite without a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return math.inf
    cores = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # v2
            mount, read = root / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            mount, read = root / "sys/fs/cgroup" / controllers, _quota_v1
            mount = mount if mount.is_dir() else root / "sys/fs/cgroup/cpu"
        else:
            continue
        # Every group on the way up may set a limit. In a container the path may be the host's: what lies there then
        # is the last of these, the mount itself.
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):
                cores = min(cores, read(mount / group))
    return cores


def _quota_v2(group: Path) -> float:
    quota, period = (group / "cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(group: Path) -> float:
    quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return math.inf if quota <= 0 else quota / period


def side_by_side(function: Callable, items: list, at_once: int) -> list:
    """[function(item) for every item], up to `at_once` of them at the same time."""
    if min(at_once, len(items)) <= 1:
        return list(map(function, items))
    contexts = _contexts()
    with ThreadPoolExecutor(min(at_once, len(items))) as pool:
        return list(pool.map(lambda item: _within(contexts, function, item), items))


def _contexts() -> dict:
    return {name: getattr(jax.config, name) for name in _CONTEXTS}


def _within(contexts, function, *args):
    with contextlib.ExitStack() as stack:
        for name, value in contexts.items():
            stack.enter_context(_CONTEXTS[name](value))
        return function(*args)
