"""Where an export goes: what is there stays until the new one is whole, whatever happens on the way."""

import dataclasses
import errno
import os
import shutil
import signal
import socket
import subprocess

import jax.numpy as jnp
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.io import destination
from aegis_jax.io.export import save_pipeline
from aegis_jax.io.pipeline import load_pipeline
from tests.io.written import as_bytes, changed_unet, files, unet_tensors


def test_existing_destinations(tiny, tmp_path):
    loaded = load_pipeline(tiny())
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(AegisError, match="out exists: choose another folder"):
        save_pipeline(loaded, out)
    with pytest.raises(AegisError, match="is no pipeline folder, so it is not overwritten"):
        save_pipeline(loaded, out, overwrite=True)
    with pytest.raises(AegisError, match="is no pipeline folder"):
        save_pipeline(loaded, out / "precious.txt", overwrite=True)
    assert os.listdir(out) == ["precious.txt"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_has_come_there_meanwhile_stays(overwrite, tmp_path):
    """Any folder without overwrite, and what is no pipeline with it."""
    out = tmp_path / "out"
    with pytest.raises(AegisError, match=r"out is no pipeline folder" if overwrite else "out exists: choose another"):
        with destination.new_folder(out, overwrite=overwrite, needed=1) as (unfinished, _):
            (unfinished / "model_index.json").write_text("{}")
            out.mkdir()
            (out / "thesis.txt").write_text("precious")
    assert (out / "thesis.txt").read_text() == "precious" and os.listdir(tmp_path) == ["out"]


def test_what_comes_there_between_the_last_look_and_the_rename_stays(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename

    def late(source, target):
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(AegisError, match="cannot write .*out: Directory not empty"):
        with destination.new_folder(out, overwrite=False, needed=1):
            pass
    assert (out / "thesis.txt").read_text() == "precious" and os.listdir(tmp_path) == ["out"]


def test_overwriting_the_folder_it_came_from(tiny_copy, tmp_path):
    folder = tiny_copy()
    (folder / "old.txt").write_text("old")
    before = unet_tensors(folder)
    loaded = load_pipeline(folder)
    edited = changed_unet(loaded, {"conv_in.bias": jnp.zeros(32)})
    save_pipeline(edited, folder, overwrite=True)
    after = unet_tensors(folder)
    assert not after["conv_in.bias"].any()
    assert as_bytes(after["conv_in.weight"]) == as_bytes(before["conv_in.weight"])
    assert not (folder / "old.txt").exists()
    assert os.listdir(tmp_path) == [folder.name]
    with pytest.raises(AegisError, match="has changed since it was loaded"):
        save_pipeline(edited, tmp_path / "again")


def test_a_folder_that_holds_the_source_is_not_replaced(tiny, tiny_copy):
    outer = tiny_copy()
    inner = shutil.copytree(tiny(seed=5), outer / "inner")
    before = {name: path.read_bytes() for name, path in files(outer).items()}
    with pytest.raises(AegisError, match="the model .*inner lies inside .*, which would be replaced"):
        save_pipeline(load_pipeline(inner), outer, overwrite=True)
    assert {name: path.read_bytes() for name, path in files(outer).items()} == before


def damage_nothing_but_fail(monkeypatch, error, after):
    """The `after`-th fsync raises `error`."""
    calls = iter(range(10**6))
    sync = os.fsync

    def failing(descriptor):
        if next(calls) == after:
            raise error
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


@pytest.mark.parametrize("after", [0, 3, 9])
def test_no_space_left_leaves_everything_as_it_was(after, tiny, tiny_copy, tmp_path, monkeypatch):
    old = tiny_copy()
    before = {name: path.read_bytes() for name, path in files(old).items()}
    loaded = load_pipeline(tiny(seed=5))
    damage_nothing_but_fail(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), after)
    with pytest.raises(AegisError, match="no space left while writing .*free some space") as error:
        save_pipeline(loaded, old, overwrite=True)
    assert "\n" not in str(error.value)
    assert {name: path.read_bytes() for name, path in files(old).items()} == before
    assert os.listdir(tmp_path) == [old.name]


def test_interrupted(tiny, tmp_path, monkeypatch):
    loaded = load_pipeline(tiny())
    damage_nothing_but_fail(monkeypatch, KeyboardInterrupt(), 5)
    with pytest.raises(KeyboardInterrupt):
        save_pipeline(loaded, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_sigterm_while_writing_leaves_everything_as_it_was(tiny, tiny_copy, tmp_path, monkeypatch):
    old, loaded = tiny_copy(), load_pipeline(tiny(seed=5))
    before = {name: path.read_bytes() for name, path in files(old).items()}
    for after in (0, 5):
        sync, calls = os.fsync, iter(range(10**6))

        def stopped(descriptor, sync=sync, calls=calls, after=after):
            if next(calls) == after:
                os.kill(os.getpid(), signal.SIGTERM)
            sync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", stopped)
            with pytest.raises(KeyboardInterrupt, match="SIGTERM while writing .*nothing was kept") as error:
                save_pipeline(loaded, old, overwrite=True)
        assert error.value.signum == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert {name: path.read_bytes() for name, path in files(old).items()} == before
        assert os.listdir(tmp_path) == [old.name]


@pytest.mark.parametrize("stop", [1, 2], ids=["the old one moved away", "the new one in place"])
def test_a_signal_between_the_renames_costs_neither_pipeline(stop, tiny, tiny_copy, tmp_path, monkeypatch):
    old, rename, calls = tiny_copy(), os.rename, iter(range(1, 10))

    def stopped(source, target):
        rename(source, target)
        if next(calls) == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "rename", stopped)
    with pytest.raises(KeyboardInterrupt, match="nothing was kept" if stop == 1 else "whole and in its place"):
        save_pipeline(load_pipeline(tiny(seed=5)), old, overwrite=True)
    wanted = tiny() if stop == 1 else tiny(seed=5)
    assert as_bytes(unet_tensors(old)["conv_in.bias"]) == as_bytes(unet_tensors(wanted)["conv_in.bias"])
    save_pipeline(load_pipeline(tiny(seed=5)), old, overwrite=True)
    assert os.listdir(tmp_path) == [old.name]


def test_what_killed_processes_left(tiny, tiny_copy, tmp_path):
    """Only what has a name of ours and whose process, on this host, is no more."""
    old, host = tiny_copy(), socket.gethostname()
    gone = subprocess.Popen(["true"])
    gone.wait()
    # In a container an erasure has the same process number after every restart.
    ours = [f".{old.name}.{host}-{pid}.{end}" for pid in (gone.pid, os.getpid()) for end in ("unfinished", "replaced")]
    others = [
        f".{old.name}.{host}-{os.getppid()}.unfinished",
        f".{old.name}.elsewhere-{gone.pid}.unfinished",
        f".another.{host}-{gone.pid}.unfinished",
        f".{old.name}.unfinished",
    ]
    for name in ours + others:
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "config.json").write_text("half")
    save_pipeline(load_pipeline(tiny(seed=5)), old, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == sorted([old.name, *others])
    assert files(old).keys() == files(tiny(seed=5)).keys() | {"README.md"}


def test_a_disk_that_is_too_small_is_refused_at_once(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    loaded = load_pipeline(tiny())
    for case in (loaded, dataclasses.replace(loaded, source=None)):
        with pytest.raises(AegisError, match="0.01 GB are needed, 0.00 GB are free"):
            save_pipeline(case, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AegisError, match="cannot write .*file/out: Not a directory"):
        save_pipeline(load_pipeline(tiny()), tmp_path / "file/out")
