"""Fixtures for all tests."""

import ctypes
import gc
import importlib.metadata
import itertools
import os
import shutil
import sys

import hypothesis
import pytest

# A busy machine draws and runs examples slowly, which says nothing about them.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
# Most of the suite's time is compiling tiny models: without LLVM's optimiser and the fusion emitters it takes far less
# (docs/performance.md), and what is computed stays the same to rounding. Before jax is imported; processes that tests
# start inherit it.
_QUICK = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):  # XLA ends a process that names a flag it no longer knows
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _QUICK)
# PyTorch's threads wait for each other in loops: with a process of tests on every core that takes forty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """A module's compiled programs go when it ends: they are most of a worker's memory, and few are used again."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(**options) -> folder of a small random pipeline (see tests/tiny.py); to be read only."""
    from tests.tiny import tiny_pipeline

    made = {}

    def make(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline", **options)
        return made[key]

    return make


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    """tiny_copy(**options) -> the same in a folder of the test's own, to be damaged."""
    numbers = itertools.count()

    def copy(**options):
        return shutil.copytree(tiny(**options), tmp_path / f"pipeline{next(numbers)}")

    return copy
