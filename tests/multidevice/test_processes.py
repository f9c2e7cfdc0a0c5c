"""Several processes on this host: they agree, train one model as a single process does, and end together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

import aegis_jax
from aegis_jax import cli
from aegis_jax.errors import AegisError
from aegis_jax.parallel import processes
from tests.multidevice.test_erase_step import HERE
from tests.run import untrained
from tests.run.runs import metrics

SMALL = {"mid_block_type": None, "up_block_types": ["UpBlock2D"]}
KEYS = {
    "method": "esd", "steps": 40, "batch": 4, "trainable": "kv", "latents.steps": 3, "latents.refresh_every": 1,
    "picture.images": 1, "picture.steps": 2, "checkpoint.every": 10, "compute_dtype": "float32",
}  # fmt: skip


def start(count, *command):
    """`count` processes that know of one another, each with one device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"AEGIS_NUM_PROCESSES": str(count), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=HERE.parent.parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **shared, "AEGIS_PROCESS_ID": str(number), "PYTHONPATH": str(HERE.parent.parent)},
        )
        for number in range(count)
    ]  # fmt: skip


@contextlib.contextmanager
def running(count, *command):
    started = start(count, *command)
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ended(started, seconds=300):
    """[(exit code, standard output, standard error)] of each, once all have ended."""
    said = [process.communicate(timeout=seconds) for process in started]
    return [(process.returncode, *text) for process, text in zip(started, said)]


def command(model, out, **keys):
    mesh = {"mesh.data": 2, **keys}
    settings = [f"--config.{key}={value}" for key, value in {**KEYS, **mesh}.items()]
    return [HERE / "one_of_several.py", "erase", "--model", model, "--concept", "star", "--out", out, *settings]


def wait_for(lines, path, started):
    while not (path.exists() and path.read_text().count("\n") >= lines):
        assert all(process.poll() is None for process in started), ended(started)
        time.sleep(0.02)


def in_one(model, out, **more):
    overrides = [(key, str(value)) for key, value in {**KEYS, **more}.items()]
    return aegis_jax.erase(model, "star", overrides=overrides, out=out)


def assert_same_run(ours, wanted, steps):
    """Runs in two folders: losses and parameters to 1e-5."""
    told, known = metrics(ours), metrics(wanted)
    assert len(told) == len(known) == steps
    for line, other in zip(told, known):
        for name in ("L_e", "drift_norm", "omega"):
            np.testing.assert_allclose(line[name], other[name], 1e-4, 1e-5, err_msg=name)
    pair = [aegis_jax.load_pipeline(folder / "pipeline").unet.params for folder in (ours, wanted)]
    apart = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), *pair)
    assert max(jax.tree.leaves(apart)) < 1e-5
    assert known[-1]["drift_norm"] > 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return untrained.write(tmp_path_factory.mktemp("several") / "model", **SMALL)


def test_three_processes_agree_and_end():
    with running(3, HERE / "meeting.py") as started:
        said = ended(started)
    host = socket.gethostname()
    for number, (_, out, _) in enumerate(said):
        *held, line = [line for line in out.splitlines() if "Gloo" not in line]
        found = json.loads(line)
        assert found["several"] and found["is_first"] == (number == 0) and found["agreed"] == 10 + number
        assert found["one_failed"] == f"AgreedError: no file here, in 1 (process 1 on {host})"
        assert found["first"] == {"by": 0}
        assert found["first_failed"] == f"AgreedError: no file here, in 0 (process 0 on {host})"
        assert found["same"] is None
        assert found["not_same"] == "AgreedError: process 2 has another setting than process 0: b"
        assert found["held"] == (None if number else "held")
        assert held == ([] if number else ["entered", "left"])
        assert "3 processes have 3; take all, e.g. --config.mesh.data=3" in found["too_few"]
        assert found["split"] and found["held_here"] == 2**16 and found["whole"]
    # Only the third fails: it says why; the others, which it leaves in the middle of something, are ended by JAX.
    assert [code for code, _, _ in said] == [-signal.SIGABRT, -signal.SIGABRT, 2]
    assert f"aegis: error: alone (process 2 on {host})" in said[2][2]


def test_two_processes_stop_together_and_one_goes_on(model, tmp_path):
    """SIGTERM to either is both's, after an agreed step; a single process resumes, and gets what one gets by itself."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    in_one(model, whole)
    with running(2, *command(model, out)) as started:
        wait_for(2, out / "metrics.jsonl", started)
        started[1].send_signal(signal.SIGTERM)
        first, second = ended(started)
    assert first[0] == second[0] == 128 + signal.SIGTERM
    done = len(metrics(out))
    assert f"SIGTERM after step {done}" in first[2] and f"SIGTERM after step {done}" in second[2]
    assert "saved; go on with" in first[2] and "saved; go on with" not in second[2]
    assert max(int(p.name) for p in (out / "checkpoints").iterdir()) == done < KEYS["steps"]
    aegis_jax.erase(out=out, resume=True, overrides=[("mesh.data", "1")])
    assert_same_run(out, whole, KEYS["steps"])


def test_two_processes_end_with_a_picture(model, tmp_path):
    with running(2, *command(model, tmp_path / "out", steps=2)) as started:
        assert [code for code, _, _ in ended(started)] == [0, 0]
    assert (tmp_path / "out" / "before_after.png").is_file() and (tmp_path / "out" / "pipeline").is_dir()


def test_what_is_missing_on_one_ends_all(model, tmp_path):
    """With one line that names it, and nothing written. Each is told of a folder by a link that only it has."""
    out, link = tmp_path / "out", tmp_path / "link"
    script = tmp_path / "erase.py"
    lines = f"""
        import os, pathlib, sys
        from aegis_jax import cli
        link = pathlib.Path({str(link)!r} + os.environ["AEGIS_PROCESS_ID"])
        if os.environ["AEGIS_PROCESS_ID"] == "0":
            link.symlink_to({str(model)!r})
        sys.exit(cli.main(["erase", "--model", str(link), *sys.argv[1:]]))
    """
    script.write_text(textwrap.dedent(lines))
    keys = [f"--config.{key}={value}" for key, value in {**KEYS, "mesh.data": 2}.items()]
    with running(2, script, "--concept", "star", "--out", out, *keys) as started:
        for code, _, told in ended(started):
            assert code == 2 and f"{link}1 does not exist" in told and "(process 1 on " in told
            assert len([line for line in told.splitlines() if line.startswith("aegis: error")]) == 1
    assert not out.exists()


@pytest.mark.slow
def test_four_processes_are_one(model, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    in_one(model, whole)
    with running(4, *command(model, out, **{"mesh.data": 2, "mesh.fsdp": 2})) as started:
        assert [code for code, _, _ in ended(started)] == [0] * 4
    assert_same_run(out, whole, KEYS["steps"])


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on(model, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    in_one(model, whole)
    with running(2, *command(model, out, **{"checkpoint.every": 3})) as started:
        wait_for(5, out / "metrics.jsonl", started)
        started[1].kill()
        asked = time.monotonic()
        code, _, told = ended(started)[0]
        # By the connection that broke, or by the heartbeat.
        assert code in (processes.AGAIN, -signal.SIGABRT) and time.monotonic() - asked < 2 * processes.HEARTBEAT
    with running(2, *command(model, out), "--resume") as started:
        assert [code for code, _, _ in ended(started)] == [0, 0]
    assert_same_run(out, whole, KEYS["steps"])


STUCK = """
import time
from aegis_jax.parallel import processes
processes.several = lambda: True
with processes.Watchdog(least=0.4, factor=3, compiling=60) as watchdog:
    for _ in range(3):
        time.sleep(0.3)
        watchdog.beat()
    time.sleep(60)
"""


def test_a_stuck_process_is_found():
    """Not while steps come, nor within the time of the first; then its stacks are shown, and it ends."""
    asked = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=120)
    assert done.returncode == processes.AGAIN and time.monotonic() - asked < 60
    assert "no step for" in done.stderr and "go on with --resume" in done.stderr
    assert 'File "<string>", line 9' in done.stderr  # where it hangs


@pytest.mark.parametrize(
    "environment",
    [
        {"AEGIS_NUM_PROCESSES": "two"},
        {"AEGIS_NUM_PROCESSES": "2"},
        {"AEGIS_NUM_PROCESSES": "2", "AEGIS_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1"},
        {"AEGIS_NUM_PROCESSES": "2", "AEGIS_PROCESS_ID": "1"},
        {"AEGIS_NUM_PROCESSES": "2", "AEGIS_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "localhost"},
        {"AEGIS_NUM_PROCESSES": "2", "AEGIS_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "localhost:65536"},
    ],
)
def test_a_wrong_environment_is_one_line(environment, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["erase", "--model", "world", "--concept", "star", "--out", "x"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "AEGIS_PROCESS_ID" in told and "HOST:PORT" in told


def test_a_first_process_that_does_not_come():
    """One line that says where it was looked for, and a code after which a scheduler tries again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        code = "from aegis_jax.parallel import processes; processes.COMING = 1; processes.start()"
        known = {"AEGIS_NUM_PROCESSES": "2", "AEGIS_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": address}
        ran = [sys.executable, "-c", code]
        done = subprocess.run(ran, env={**os.environ, **known}, capture_output=True, text=True, timeout=120)
    assert done.returncode == processes.AGAIN and done.stderr.count("\n") == 1 and address in done.stderr


@pytest.mark.parametrize(("address", "host"), [("[::1]:8476", "::1"), ("host0:8476", "host0")])
def test_an_address_is_looked_for_as_sockets_have_it(address, host, monkeypatch):
    """An IPv6 address has brackets for JAX, and none for a socket."""
    asked = []

    def connect(place, timeout):
        asked.append(place)
        return socket.socket()

    monkeypatch.setattr(processes.socket, "create_connection", connect)
    processes._reach(address)
    assert asked == [(host, 8476)]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer"), 134, "another process has gone"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nlong"), 2, "memory is full"),
        (jax.errors.JaxRuntimeError("INTERNAL: x Out of memory allocating 9 bytes"), 2, "memory is full"),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a wrong kernel"), 1, "Traceback"),
        (AegisError("mend it"), 2, "aegis: error: mend it"),
        (ZeroDivisionError("ours"), 1, "Traceback"),
    ],
)
def test_what_one_process_fails_by(error, code, told, monkeypatch, capsys):
    """What restarting mends is told apart from what it does not."""
    left = []
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes.os, "_exit", left.append)
    with processes.ending():
        raise error
    assert left == [code] and told in capsys.readouterr().err
    for agreed in (processes.AgreedError("all"), KeyboardInterrupt()):
        with pytest.raises(type(agreed)), processes.ending():
            raise agreed


def test_one_process_alone_asks_nobody(monkeypatch):
    monkeypatch.setenv("AEGIS_NUM_PROCESSES", "1")
    processes.start()
    assert not processes.several() and processes.is_first() and not processes.stop_agreed(1)
    assert processes.first(lambda: 3) == processes.agreed(lambda: 3) == 3
