"""launch/local.sh: copies on one machine, started again where a signal ended them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "local.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def run(*argv, **options):
    return subprocess.run([SCRIPT, *map(str, argv)], capture_output=True, text=True, timeout=60, **options)


def test_shellcheck():
    found = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip("shellcheck is not installed; it is in the extra dev")
    done = subprocess.run([found, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dry_run_says_what_would_be_run():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    done = run("--dry-run", 2, "aegis", "batch", "my plan.csv", env=os.environ | {"OMP_NUM_THREADS": str(cores)})
    threads = max(cores // 2, 1)
    command = f"env PJRT_NPROC={threads} OMP_NUM_THREADS={threads} aegis batch my\\ plan.csv"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"[1] {command}\n[2] {command}\n"


def test_every_copy_runs_with_its_mark_and_its_threads():
    done = run(3, "bash", "-c", 'echo "one $PJRT_NPROC"; echo two >&2; printf three')
    lines = sorted(done.stdout.splitlines())
    assert done.returncode == 0 and done.stderr == ""
    assert [re.sub("one [0-9]+", "one", line) for line in lines if "three" not in line] == [
        f"[{k}] {word}" for k in (1, 2, 3) for word in ("one", "two")
    ]
    assert [line for line in lines if "three" in line] == [f"[{k}] three" for k in (1, 2, 3)]


@pytest.mark.parametrize(("codes", "wanted"), [((0, 0), 0), ((1, 0), 1), ((2, 1), 2)])
def test_one_that_ends_by_itself_is_not_started_again(tmp_path, codes, wanted):
    """The exit code is the largest."""
    script = 'mkdir "$0/$$"; n=$(mkdir "$0/first" 2>/dev/null && echo 1 || echo 2); exit "${!n}"'
    done = run(2, "bash", "-c", script, tmp_path, *codes)
    assert done.returncode == wanted and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["KILL", "TERM"])
def test_one_that_a_signal_has_ended_is_started_again(tmp_path, name):
    script = f'mkdir "$0/first" 2>/dev/null && kill -{name} $$; echo "alive"'
    done = run(2, "bash", "-c", script, tmp_path)
    number = signal.Signals[f"SIG{name}"].value
    assert done.returncode == 0 and len(re.findall(r"^\[.\] alive$", done.stdout, re.MULTILINE)) == 2
    assert f"ended with {128 + number}, starting it again" in done.stdout


def test_one_that_always_breaks_is_started_ever_more_slowly(tmp_path):
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = run(1, "bash", "-c", 'echo >>"$0"; (($(wc -l <"$0") < 33)) && exit 134', tmp_path / "count", env=environment)
    assert done.returncode == 1
    assert [int(n) for n in re.findall(r"ended with 134, starting it again in (\d+) s", done.stdout)] == [
        *range(1, 31), 30, 30,
    ]  # fmt: skip


def test_one_that_waits_to_be_started_again_ends_at_a_signal():
    copies = subprocess.Popen([SCRIPT, "1", "bash", "-c", "exit 134"], stdout=subprocess.PIPE, text=True)
    for _ in range(3):  # the third pause is of three seconds
        line = copies.stdout.readline()
    assert "again in 3 s" in line
    copies.terminate()
    assert copies.communicate(timeout=30)[0] == "" and copies.returncode == 143


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on(tmp_path, signum):
    """To every copy as SIGTERM, and none is started again."""
    script = 'trap "echo told; exit 143" TERM; mkdir "$0/$$"; while true; do sleep 0.05; done'
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
    try:
        copies = subprocess.Popen([SCRIPT, "2", "bash", "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.02)
    copies.send_signal(signum)
    out, _ = copies.communicate(timeout=60)
    assert copies.returncode == 143 and sorted(out.splitlines()) == ["[1] told", "[2] told"]


@pytest.mark.parametrize("argv", [(), ("0", "true"), ("two", "true"), ("2",), ("--dry-run",), ("--help",)])
def test_bad_arguments(argv):
    done = run(*argv)
    assert done.returncode == 2 and done.stderr.startswith("usage: launch/local.sh") and done.stdout == ""
