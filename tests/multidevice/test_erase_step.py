"""Runs eight_devices.py in a process of its own (`run`): the number of virtual devices is fixed when JAX starts."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def run(path: pathlib.Path) -> None:
    """A file of tests on 8 virtual devices."""
    # Unoptimised code: compiling takes most of the time here.
    wanted = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {wanted}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(path)],
        cwd=HERE.parent.parent,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_step_on_eight_virtual_devices():
    run(HERE / "eight_devices.py")
