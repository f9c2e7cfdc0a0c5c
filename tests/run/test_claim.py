"""run/claim.py and RunFolder.claimed: one process in a run folder at a time."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from aegis_jax.errors import AegisError
from aegis_jax.run import claim
from aegis_jax.run.claim import LOCK, claimed
from tests.run.runs import erase, files
from tests.run.test_resume import start


def write_lock(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "born": claim._born(os.getpid())}
    (folder / LOCK).write_text(json.dumps(mine | changes))


@pytest.fixture(scope="module")
def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without such locks."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claim.fcntl, "flock", refuse)


HOLD = "import sys, time; from pathlib import Path; from aegis_jax.run import claim\n"
HOLD += "claim.socket.gethostname = lambda: 'node-17'\n"
HOLD += "with claim.claimed(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_live_holder_is_told_by_its_lock_not_its_number(tmp_path):
    """In a container a process has a number of its own; on another node a host of its own; killed, it holds nothing."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert json.loads((tmp_path / LOCK).read_text())["host"] == "node-17"
        with pytest.raises(AegisError, match=f"in use by process {process.pid} on host node-17: wait"):
            with claimed(tmp_path):
                pass
        write_lock(tmp_path, pid=2**22 + 1)  # as it looks from another container of this host name
        with pytest.raises(AegisError, match=f"in use by process {2**22 + 1} on this host"):
            with claimed(tmp_path):
                pass
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / LOCK).exists()
    with claimed(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()


def test_a_folder_is_held_and_given_back(tmp_path):
    with claimed(tmp_path / "a" / "b"):
        holder = json.loads((tmp_path / "a" / "b" / LOCK).read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(AegisError, match=f"in use by process {os.getpid()} on this host, {socket.gethostname()}"):
            with claimed(tmp_path / "a" / "b"):
                pass
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert not (tmp_path / "a").exists()  # nothing came into it
    with claimed(tmp_path / "a"):
        (tmp_path / "a" / "result").write_text("mine")
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["result"]


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(tmp_path, stale):
    """Also where all of them find a stale lock."""
    won, lost = [], []
    if stale:
        write_lock(tmp_path / "run", pid=2**22 + 1)
    ready, done = threading.Barrier(8), threading.Event()

    def work():
        ready.wait()
        try:
            with claimed(tmp_path / "run"):
                won.append(1)
                done.wait(60)
        except AegisError:
            lost.append(1)
            if len(lost) == 7:
                done.set()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, gone, no_flock):
    write_lock(tmp_path, pid=gone)
    with claimed(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="where a process's age can be told")
def test_a_number_given_anew_is_another_process(tmp_path, no_flock):
    write_lock(tmp_path, born="1")
    with claimed(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "here"}', '{"host": 1, "pid": "x", "born": null}'])
def test_a_lock_that_says_nothing_is_refused(tmp_path, text, no_flock):
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(AegisError, match=f"cannot be told.*remove .*{LOCK}"):
        with claimed(tmp_path):
            pass
    assert (tmp_path / LOCK).read_text() == text


@pytest.mark.parametrize("locks", [True, False])
def test_another_hosts_lock_is_refused_with_a_remedy(cheap_step, finished, folder, gone, locks, request):
    if not locks:
        request.getfixturevalue("no_flock")
    write_lock(finished, host="node-17", pid=gone)
    before = files(finished)
    for how in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(AegisError, match=f"process {gone} on host node-17 .*remove .*{LOCK}"):
            erase(folder, finished, **how)
    assert files(finished) == before


def test_a_second_process_leaves_a_run_alone(cheap_step, folder, tmp_path):
    """While one process works in the folder another neither starts, resumes nor overwrites there."""
    out = tmp_path / "run"
    process = start(folder, out, seconds=0.5)
    try:
        held = (out / LOCK).read_text()
        for how in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(AegisError, match=f"in use by process {process.pid} on this host") as refusal:
                erase(folder, out, **how)
            assert "\n" not in str(refusal.value)
        assert process.poll() is None and (out / LOCK).read_text() == held
    finally:
        process.kill()
        process.communicate()
    erase(folder, out, resume=True, keys={"steps": 40, "checkpoint.every": 2})  # that one is gone
    assert not (out / LOCK).exists()


def test_what_another_process_finished_meanwhile_is_not_wiped(cheap_step, folder, finished, tmp_path, monkeypatch):
    """The folder was free when it was looked at, and is a finished run when it is claimed."""
    out, honest = tmp_path / "run", claim.claimed

    def late(path):
        shutil.copytree(finished, path)
        return honest(path)

    monkeypatch.setattr(claim, "claimed", late)
    with pytest.raises(AegisError, match="exists.*--overwrite"):
        erase(folder, out)
    assert files(out) == files(finished)


def test_bad_input_leaves_no_lock(cheap_step, folder, finished, tmp_path):
    for out in (tmp_path / "new", finished):
        with pytest.raises(AegisError):
            erase(tmp_path / "nowhere", out, overwrite=True)
    assert not (tmp_path / "new").exists() and not (finished / LOCK).exists()


def test_a_lock_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "RENEWED", 0.02)
    with claimed(tmp_path):
        first, until = claim._state(tmp_path / LOCK), time.monotonic() + 30
        while claim._state(tmp_path / LOCK) == first:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_a_file_system_that_does_not_answer_for_a_while_ends_no_renewing(tmp_path, monkeypatch):
    """Else a live run would be silent, and taken over, without ever noticing."""
    monkeypatch.setattr(claim, "RENEWED", 0.02)
    honest, asked = claim._is_at, threading.Event()

    def stale(file, lock):
        if threading.current_thread().name == "claim" and not asked.is_set():
            asked.set()
            raise OSError(errno.ESTALE, "Stale file handle")
        return honest(file, lock)

    monkeypatch.setattr(claim, "_is_at", stale)
    with claimed(tmp_path):
        assert asked.wait(30)
        first, until = claim._state(tmp_path / LOCK), time.monotonic() + 30
        while claim._state(tmp_path / LOCK) == first:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_the_lock_of_one_that_has_taken_over_is_left_alone(tmp_path):
    with claimed(tmp_path):
        (tmp_path / LOCK).unlink()
        write_lock(tmp_path, host="node-17")
    assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("renewed", [False, True])
def test_a_silent_lock_of_another_host_is_taken_over(tmp_path, monkeypatch, gone, renewed, no_flock):
    """By who is told to go on by itself; a holder that renews it keeps it."""
    monkeypatch.setattr(claim, "SILENT", 1.0)
    write_lock(tmp_path, host="node-17", pid=gone)
    if renewed:
        threading.Timer(0.4, os.utime, [tmp_path / LOCK]).start()
    said = []
    claim.take_over(tmp_path, say=said.append)
    assert len(said) == 1 and f"process {gone} on host node-17" in said[0]
    assert (tmp_path / LOCK).exists() == renewed
    if not renewed:
        claim.take_over(tmp_path, say=said.append)  # there is none
        with claimed(tmp_path):
            claim.take_over(tmp_path, say=said.append)  # of this host
            assert (tmp_path / LOCK).exists()
    assert len(said) == 1


def test_one_whose_folder_was_taken_over_ends(tmp_path):
    code = "import sys, time; from pathlib import Path; from aegis_jax.run import claim; claim.RENEWED = 0.1\n"
    code += "with claim.claimed(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        (tmp_path / LOCK).unlink()
        write_lock(tmp_path, host="node-17", pid=1)
        told = process.communicate(timeout=50)[1]
    finally:
        process.kill()
    assert process.returncode == claim.AGAIN and "taken over by process 1 on host node-17" in told
    assert (tmp_path / LOCK).exists()
