"""launch/slurm.sbatch: with an `srun` that runs its command here, and on a real SLURM of two nodes on loopback."""

import os
import shutil
import subprocess
import time

import pytest

from tests.launch import stubs
from tests.launch.stubs import LAUNCH

SCRIPT = LAUNCH / "slurm.sbatch"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
# One element of an array has the array's own id: asked for by that, SLURM would take all of them.
ELEMENT = JOB | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
# Ends with SRUN_CODE where that is set, as the real one does for a task that it has ended because another had failed.
SRUN = """
export SLURM_PROCID=0; while [[ $1 == --* ]]; do shift; done
code=0; "$@" || code=$?; exit "${SRUN_CODE:-$code}"
"""


@pytest.fixture
def slurm(tmp_path):
    stubs.write(tmp_path, srun=SRUN, scontrol="true", sleep="true")
    return tmp_path


def submit(folder, script, **environment):
    return stubs.run(folder, "bash", SCRIPT, "bash", "-c", script, **environment)


def scontrol(folder):
    return [line for line in stubs.calls(folder) if line.startswith("scontrol")]


@pytest.mark.parametrize("job", [JOB, ELEMENT])
@pytest.mark.parametrize(
    ("code", "asked"),
    [(0, []), (1, ["update JobId={} Requeue=0"]), (2, ["update JobId={} Requeue=0"]), (137, ["requeue {}"]),
     (143, ["requeue {}"]), (134, ["requeue {}"]), (3, [])],
)  # fmt: skip
def test_exit_codes(slurm, job, code, asked):
    """Over 128 is tried again; 1 and 2 tell SLURM not to, whatever another process of the job ends with."""
    done = submit(slurm, f"exit {code}", **job)
    name = "7_1" if job is ELEMENT else "7"
    assert done.returncode == code and scontrol(slurm) == [f"scontrol {line.format(name)}" for line in asked]
    assert ("asking SLURM to start it again (1 of at most 20)" in done.stdout) == (code > 128)


def test_restarts_are_bounded(slurm):
    done = submit(slurm, "exit 137", **JOB, SLURM_RESTART_COUNT="3", AEGIS_MAX_RESTARTS="3")
    assert done.returncode == 137 and scontrol(slurm) == [] and "started again 3 times" in done.stdout


def test_one_that_failed_for_good_says_so_before_srun_ends(slurm):
    """srun's own code is then that of the others, which it has ended."""
    assert submit(slurm, "exit 2", **JOB, SRUN_CODE="143").returncode == 143
    assert scontrol(slurm)[0] == "scontrol update JobId=7 Requeue=0"


def test_what_is_run_and_with_which_environment(slurm):
    def told(**environment):
        done = submit(
            slurm, 'echo "${AEGIS_NUM_PROCESSES-} ${JAX_LOCAL_DEVICE_IDS-} ${SRUN_CPUS_PER_TASK-}"', **environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, stubs.calls(slurm)[-1].split(" bash ")[0]

    one = "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1"
    assert told(**ELEMENT, SLURM_GPUS_ON_NODE="4") == ("  \n", one)
    two = JOB | {"SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "16"}
    assert told(**two) == ("auto  16\n", one.replace("=1 --ntasks=1", "=2 --ntasks=2"))
    assert told(**two, SLURM_GPUS_ON_NODE="4")[0] == "auto 0,1,2,3 16\n"


def test_dry_run(slurm):
    """As above, but printed; without SLURM too."""
    for environment in (ELEMENT, {"SLURM_NNODES": "2"}):
        done = stubs.run(slurm, "bash", SCRIPT, "--dry-run", "aegis", "erase", "--auto-resume", **environment)
        assert done.returncode == 0 and stubs.calls(slurm) == []
        assert done.stdout.startswith("env ") and " srun --nodes=" in done.stdout and "aegis erase" in done.stdout
    assert done.stdout.startswith("env AEGIS_NUM_PROCESSES=auto srun --nodes=2 ")


@pytest.mark.parametrize(
    ("argv", "environment", "told"),
    [
        ([], JOB, "no command"),
        (["aegis", "batch"], {}, "not a SLURM job"),
        (["aegis", "batch"], ELEMENT | {"SLURM_NNODES": "2"}, "either --array or --nodes"),
        (["aegis", "batch"], JOB | {"SLURM_NNODES": "2"}, "--array=1-2 instead of --nodes=2"),
        (["aegis", "erase", "--out", "x"], JOB, "add --auto-resume"),
    ],
)
def test_bad_arguments(slurm, argv, environment, told):
    done = stubs.run(slurm, "bash", SCRIPT, *argv, **environment)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1 and stubs.calls(slurm) == []


# --- on a real one ---


@pytest.fixture(scope="module")
def loopback(tmp_path_factory):
    """Environment for a SLURM of two nodes."""
    folder, tool = tmp_path_factory.mktemp("slurm"), LAUNCH.parent / "tools" / "slurm_loopback.sh"
    started = subprocess.run([tool, "start", folder], capture_output=True, text=True)
    try:
        if started.returncode:
            pytest.skip((started.stderr or "no SLURM here").strip().splitlines()[-1])
        lines = subprocess.run(["bash", "-c", f". {folder}/env; env -0"], capture_output=True, text=True, check=True)
        yield dict(line.split("=", 1) for line in lines.stdout.split("\0") if line)
    finally:
        subprocess.run([tool, "stop", folder], check=True)


class Queue:
    """A SLURM, asked with its own commands."""

    def __init__(self, environment, folder):
        self.options = {"env": environment, "cwd": folder, "text": True, "capture_output": True}

    def __call__(self, *argv):
        return subprocess.run(argv, check=True, **self.options).stdout.strip()

    def submit(self, *argv, script):
        return self("sbatch", "--parsable", *argv, SCRIPT, "bash", "-c", script)

    def state(self, job):
        """(its state, how often it was started again)"""
        found = dict(word.split("=", 1) for word in self("scontrol", "-o", "show", "job", job).split() if "=" in word)
        return found["JobState"], int(found["Restarts"])

    def wait(self, wanted, seconds=60):
        end = time.monotonic() + seconds
        while not wanted():
            assert time.monotonic() < end, self("squeue", "--format=%i %T %r")
            time.sleep(0.3)

    def ended(self, job):
        self.wait(lambda: self.state(job)[0] in ("COMPLETED", "FAILED", "CANCELLED"))
        return self.state(job)

    def again(self, job):
        """Waits until it is in the queue again, and has it not wait there for two minutes, as SLURM has it."""
        self.wait(lambda: self.state(job) == ("PENDING", 1))
        now = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
        self.wait(lambda: subprocess.run(now, **self.options).returncode == 0)


ELEMENT_SCRIPT = """
echo $$ >>"pids-$SLURM_ARRAY_TASK_ID"
while [[ ! -e go ]]; do sleep 0.2; done
"""
SAVING = """
echo "$AEGIS_NUM_PROCESSES" >"node-$SLURM_PROCID"
((SLURM_RESTART_COUNT)) && exit 0
trap 'touch "saved-$SLURM_PROCID"; exit 143' TERM
while sleep 0.2; do :; done
"""


@pytest.mark.slow
def test_on_a_real_slurm(loopback, tmp_path):
    queue = Queue(loopback, tmp_path)

    # An array: the element that has the array's own id is killed; it alone is started again.
    array = queue.submit("--array=0-1", script=ELEMENT_SCRIPT)
    pids = [tmp_path / "pids-0", tmp_path / "pids-1"]
    queue.wait(lambda: all(path.exists() and path.read_text() for path in pids))
    os.kill(int(pids[1].read_text()), 9)
    queue.again(f"{array}_1")
    queue.wait(lambda: len(pids[1].read_text().split()) == 2)
    (tmp_path / "go").touch()
    queue.wait(lambda: queue.state(f"{array}_0")[0] == queue.state(f"{array}_1")[0] == "COMPLETED")
    assert len(pids[0].read_text().split()) == 1

    # Two nodes, told to stop: both save, then both go on.
    job = queue.submit("--nodes=2", script=SAVING)
    nodes = [tmp_path / "node-0", tmp_path / "node-1"]
    queue.wait(lambda: all(path.exists() for path in nodes))
    time.sleep(1)  # until they have set their traps
    queue("scancel", "--signal=TERM", job)
    queue.again(job)
    queue.wait(lambda: queue.state(job)[0] == "COMPLETED")
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert [path.read_text() for path in nodes] == ["auto\n", "auto\n"]

    # One that fails for good, by which srun ends the other: not started again.
    for code in (1, 2):
        job = queue.submit("--nodes=2", script=f"((SLURM_PROCID)) && exit {code}; sleep 60")
        assert queue.ended(job) == ("FAILED", 0)
    # Nor one that its user has ended.
    job = queue.submit("--nodes=2", script="touch begun; sleep 60")
    queue.wait(lambda: (tmp_path / "begun").exists())
    queue("scancel", job)
    assert queue.ended(job) == ("CANCELLED", 0)
    time.sleep(3)
    assert queue.state(job) == ("CANCELLED", 0)
