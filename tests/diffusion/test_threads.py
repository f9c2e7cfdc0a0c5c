"""Calls side by side: the same results in the same contexts. And on how many cores."""

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.diffusion.threads import cores, side_by_side


def whose(x):
    return x + 1, threading.current_thread().name, jax.config.jax_default_matmul_precision, jax.random.key(0).dtype


def test_other_threads_work_in_the_callers_contexts():
    items = [jnp.arange(3.0), jnp.arange(2.0)]
    with jax.default_matmul_precision("highest"), jax.default_prng_impl("rbg"):
        found = side_by_side(whose, items, 2)
        wanted = whose(items[0])
    for (y, name, precision, key_type), x in zip(found, items, strict=True):
        np.testing.assert_array_equal(y, x + 1)
        assert name != threading.current_thread().name
        assert (precision, key_type) == wanted[2:]


def test_one_at_a_time_stays_in_the_callers_thread():
    assert side_by_side(whose, [jnp.zeros(1)] * 2, 1)[0][1] == threading.current_thread().name


def test_no_context_means_the_same_program():
    traced = []

    @jax.jit
    def program(x):
        traced.append(x)
        return x @ x.T

    x = jnp.ones((2, 2))
    program(x)
    side_by_side(program, [x, x], 2)
    assert len(traced) == 1


def test_an_error_in_another_thread_is_raised():
    def fails(x):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        side_by_side(fails, [1, 2], 2)


@pytest.fixture
def host(monkeypatch, tmp_path):
    """host(affinity, files) -> the root of a machine of 64 cores, the files those of proc/ and sys/."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)

    def make(affinity, files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"
OURS_V1 = "7:memory:/job\n4:cpu,cpuacct:/job/task\n0::/\n"


@pytest.mark.parametrize(
    ("affinity", "files", "wanted"),
    [
        (64, {}, 64),
        (3, {}, 3),
        (64, {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/cpu.max": "max 100000\n"}, 64),
        (64, {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/cpu.max": "350000 100000\n"}, 4),
        (2, {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/cpu.max": "350000 100000\n"}, 2),
        # A group above has less than one's own.
        (64, {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/cpu.max": "9 1\n", f"{V2}/a/cpu.max": "5 1\n"}, 5),
        # In a container the path is the host's and the mount is the container's own group.
        (64, {"proc/self/cgroup": "0::/host/pod\n", f"{V2}/cpu.max": "50000 100000\n"}, 1),
        (64, {"proc/self/cgroup": OURS_V1, f"{V1}/job/task/cpu.cfs_quota_us": "-1\n",
              f"{V1}/job/task/cpu.cfs_period_us": "100000\n"}, 64),
        (64, {"proc/self/cgroup": OURS_V1, f"{V1}/job/cpu.cfs_quota_us": "600000\n",
              f"{V1}/job/cpu.cfs_period_us": "100000\n"}, 6),
        (64, {"proc/self/cgroup": "4:cpu:/\n", f"{V2}/cpu/cpu.cfs_quota_us": "700000\n",
              f"{V2}/cpu/cpu.cfs_period_us": "100000\n"}, 7),
        (64, {"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "nonsense"}, 64),
    ],
)  # fmt: skip
def test_cores_are_those_that_the_process_may_use(host, affinity, files, wanted):
    assert cores(host(affinity, files)) == wanted


def test_cores_without_affinity_are_the_hosts(host, monkeypatch):
    root = host(2, {})
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores(root) == 64
