"""What all of launch/ has in common, its Dockerfiles and flags."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tools/*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    found = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip("shellcheck is not installed; it is in the extra dev")
    done = subprocess.run([found, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_dockerfile(kind):
    """It copies what is there, and installs an extra that there is; nothing has built it."""
    lines = (ROOT / "launch" / f"Dockerfile.{kind}").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"setup.py", "aegis_jax", "configs", "requirements.lock"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    (extra,) = re.findall(r"'\.\[(\w+)\]'", "\n".join(lines))
    assert re.search(rf'^ +"{extra}": \["jax\[', (ROOT / "setup.py").read_text(), re.MULTILINE)


def sourced(kind, then, **environment):
    script = f". {ROOT}/launch/xla_flags.sh {kind} && . {ROOT}/launch/xla_flags.sh {kind} && {then}"
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return subprocess.run(["bash", "-euc", script], capture_output=True, text=True, env=kept | environment)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_flags_are_added_once_and_leave_what_is_set():
    mine = "--xla_dump_to=x --xla_gpu_enable_latency_hiding_scheduler=false"
    assert sourced("gpu", "echo $XLA_FLAGS", XLA_FLAGS=mine).stdout == f"{mine}\n"
    added = sourced("tpu", "echo $LIBTPU_INIT_ARGS", LIBTPU_INIT_ARGS="--a=1").stdout.split()
    assert added[0] == "--a=1" and len(added) == len(set(added)) == 6
    assert sourced("cpu", "true").returncode == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_this_xla_knows_the_flags():
    """An unknown one in XLA_FLAGS ends the process. Those of libtpu are not XLA's, and not checked here."""
    start = f"{sys.executable} -c 'import jax; jax.devices(\"cpu\")'"
    done = sourced("gpu", start, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert sourced("gpu", start, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_gpu_no_such_flag=true").returncode != 0
