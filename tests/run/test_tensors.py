"""run/tensors.py: what is kept of every trained tensor, over an interruption too."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import aegis_jax
from aegis_jax.errors import AegisError
from aegis_jax.models.layout import torch_key
from aegis_jax.models.model import flatten
from aegis_jax.run.tensors import TensorLog
from tests.run.runs import erase
from tests.run.test_resume import interrupt

NAMES = ["a.weight", "a.bias", "b.weight"]


def rows(n, start=0):
    return [{kind: np.float32([i, -i, i / 2]) + shift for kind, shift in (("cosine", 0), ("omega", 9))}
            for i in range(start, start + n)]  # fmt: skip


def log_of(n, start=0):
    log = TensorLog(NAMES)
    for row in rows(n, start):
        log.append(row)
    return log


def test_what_is_written_can_be_read(tmp_path):
    log, path = log_of(4), tmp_path / "t.safetensors"
    log.write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]  # nothing unfinished
    with safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["tensors"]) == NAMES
        for kind, shift in (("cosine", 0), ("omega", 9)):
            array = file.get_tensor(kind)
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, [[i + shift, shift - i, i / 2 + shift] for i in range(4)])


def test_going_on_takes_the_rows_of_the_steps_done_and_no_more(tmp_path):
    """A run that was killed after its newest checkpoint has written more of them."""
    path = tmp_path / "t.safetensors"
    log_of(5).write(path)
    log = TensorLog(NAMES)
    log.read(path, 3)
    for row in rows(4, start=3):
        log.append(row)
    again = tmp_path / "again.safetensors"
    log.write(again)
    log_of(7).write(path)
    assert again.read_bytes() == path.read_bytes()


def test_nothing_to_write_and_nothing_to_read(tmp_path):
    log = TensorLog(NAMES)
    log.write(tmp_path / "t.safetensors")
    log.read(tmp_path / "t.safetensors", 3)
    assert log.arrays() == {} and not list(tmp_path.iterdir())


def test_rows_that_are_lost_shift_no_others(tmp_path):
    path, log = tmp_path / "t.safetensors", TensorLog(NAMES)
    log.read(path, 4)
    for row in rows(3, start=4):
        log.append(row)
    log.write(path)
    for steps, known in ((7, [4, 5, 6]), (5, [4])):  # the second: a resumed run's newest checkpoint
        again = TensorLog(NAMES)
        again.read(path, steps)
        array = again.arrays()["cosine"]
        assert array.shape == (steps, 3) and np.isnan(array[:4]).all()
        np.testing.assert_array_equal(array[4:], [[i, -i, i / 2] for i in known])
    early = TensorLog(NAMES)
    early.read(path, 2)  # before all that is known
    for row in rows(1, start=2):
        early.append(row)
    np.testing.assert_array_equal(early.arrays()["omega"], [[np.nan] * 3, [np.nan] * 3, [11, 7, 10]])


def test_a_file_that_is_on_its_way_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("sync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    log_of(2).write(tmp_path / "t.safetensors")
    assert calls == ["sync", "replace"]


def test_a_run_whose_file_is_deleted_goes_on_ends_and_can_be_opened(
    cheap_step, folder, tmp_path, monkeypatch, finished
):
    out = tmp_path / "run"
    interrupt(folder, out, monkeypatch, 4)
    (out / "per_tensor.safetensors").unlink()
    whole = aegis_jax.erase(out=finished, resume=True).per_tensor["cosine"]
    for result in (aegis_jax.erase(out=out, resume=True), aegis_jax.erase(out=out, resume=True)):
        assert result.per_tensor["cosine"].shape == whole.shape and np.isnan(result.per_tensor["cosine"][:5]).all()
        np.testing.assert_array_equal(result.per_tensor["cosine"][5:], whole[5:])
    (out / "per_tensor.safetensors").unlink()
    assert aegis_jax.erase(out=out, resume=True).per_tensor == {}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    log_of(2).write(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aegis_jax.run.tensors.save_file", full)
    with pytest.raises(OSError):
        log_of(3).write(path)
    assert path.read_bytes() == before


BROKEN = {
    "no safetensors": lambda path: path.write_bytes(b"no file of ours"),
    "no names": lambda path: save_file({"cosine": np.zeros((9, 3), np.float32)}, path),
    "names that are no JSON": lambda path: save_file({"cosine": np.zeros((9, 3), np.float32)}, path, {"tensors": "["}),
    "other tensors": lambda path: save_file(
        {"cosine": np.zeros((9, 1), np.float32)}, path, {"tensors": json.dumps(["c.weight"])}
    ),
    "a first step of none": lambda path: save_file(
        {"cosine": np.zeros((9, 3), np.float32)}, path, {"tensors": json.dumps(NAMES), "first_step": "0"}
    ),
    "names that nest too deeply": lambda path: save_file(
        {"cosine": np.zeros((9, 3), np.float32)}, path, {"tensors": "[" * 100_000}
    ),
    "a scalar": lambda path: save_file({"cosine": np.zeros((), np.float32)}, path, {"tensors": json.dumps(NAMES)}),
    "other columns": lambda path: save_file(
        {"cosine": np.zeros((9, 4), np.float32)}, path, {"tensors": json.dumps(NAMES)}
    ),
    "a folder": lambda path: path.mkdir(),
    "too few steps": lambda path: log_of(2).write(path),
    "a part cut off": lambda path: (log_of(9).write(path), path.write_bytes(path.read_bytes()[:-20])),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_of_something_else_is_refused(tmp_path, how):
    path = tmp_path / "t.safetensors"
    BROKEN[how](path)
    with pytest.raises(AegisError, match="t.safetensors .*delete it to go on without its rows") as error:
        TensorLog(NAMES).read(path, 3)
    assert "\n" not in str(error.value)


def test_the_run_s_file_has_a_column_for_every_tensor_that_changed(cheap_step, folder, tmp_path):
    result = erase(folder, tmp_path / "run")
    before, after = (flatten(p.unet.params) for p in (result.original, result.pipeline))
    moved = {torch_key(path) for path in before if not np.array_equal(before[path], after[path])}
    assert set(result.tensors) == moved and len(result.tensors) == len(moved)
    with safe_open(tmp_path / "run" / "per_tensor.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["tensors"]) == result.tensors
        kinds = {kind: file.get_tensor(kind) for kind in file.keys()}
    assert kinds.keys() == result.per_tensor.keys() == {"cosine", "kept", "omega"}
    for kind, array in kinds.items():
        assert array.shape == (7, len(moved))
        np.testing.assert_array_equal(array, result.per_tensor[kind])
    alone = erase(folder, None)
    np.testing.assert_array_equal(alone.per_tensor["cosine"], kinds["cosine"])
    finished = aegis_jax.erase(out=tmp_path / "run", resume=True)  # nothing is left to do, and all of it is told
    np.testing.assert_array_equal(finished.per_tensor["kept"], kinds["kept"])
