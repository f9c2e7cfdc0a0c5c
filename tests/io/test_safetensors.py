"""The safetensors reader and writer against the reference implementation."""

import errno
import json
import math
import os
import struct
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors as reference
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aegis_jax.errors import AegisError
from aegis_jax.io import safetensors

TENSORS = {
    "b.weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) / 7,
    "a.bias": torch.tensor([1.5, -0.0, float("inf"), float("nan")], dtype=torch.float16),
    "brain": torch.randn(5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "ids": torch.arange(7)[None],
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.25, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def official(tmp_path):
    path = tmp_path / "official.safetensors"
    save_file(TENSORS, path, {"format": "pt", "note": "ümlaut"})
    return path


def read_all(path):
    header = safetensors.read_header(path)
    with safetensors.open_unchanged(header) as file:
        return {key: safetensors.read_tensor(file, header, key) for key in header.entries}


def bits(array):
    if isinstance(array, torch.Tensor):
        return array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return array.tobytes()


def layout(raw_fields, data=b""):
    """A file's bytes with this header (dict or raw bytes)."""
    raw = raw_fields if isinstance(raw_fields, bytes) else json.dumps(raw_fields).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def f32(*shape, at):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + 4 * math.prod(shape)]}


def test_reads_what_the_reference_wrote(official):
    header = safetensors.read_header(official)
    tensors = read_all(official)
    assert header.metadata == {"format": "pt", "note": "ümlaut"}
    assert set(tensors) == set(TENSORS)
    for key, wanted in TENSORS.items():
        assert tensors[key].shape == tuple(wanted.shape), key
        assert bits(tensors[key]) == bits(wanted), key
    assert tensors["brain"].dtype == ml_dtypes.bfloat16


def test_the_reference_reads_what_was_written(tmp_path):
    arrays = {
        "z": np.array([1, 2, 3], np.float16),  # 6 bytes: unaligned if float32 came after it
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "m": np.array([0.1, -7], ml_dtypes.bfloat16),
        "n": np.array(5, np.int64),
    }
    names = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}
    entries = [safetensors.Entry(key, names.get(array.dtype, "BF16"), array.shape) for key, array in arrays.items()]
    path = tmp_path / "ours.safetensors"
    safetensors.write(path, entries, lambda key, rows: arrays[key][rows], metadata={"format": "pt"})
    loaded = load_file(path)
    assert {key: bits(value) for key, value in loaded.items()} == {
        key: bits(np.ascontiguousarray(array)) for key, array in arrays.items()
    }
    with reference.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert list(safetensors.read_header(path).entries) == ["z", "a", "m", "n"]
    assert os.listdir(tmp_path) == ["ours.safetensors"]


def test_a_copy_is_identical_to_the_last_byte(official, tmp_path):
    header = safetensors.read_header(official)
    tensors = read_all(official)
    copy = tmp_path / "copy.safetensors"
    safetensors.write(
        copy,
        header.entries.values(),
        lambda key, rows: tensors[key][rows],
        metadata=header.metadata,
        raw_header=header.raw,
    )
    assert copy.read_bytes() == official.read_bytes()


def test_reading_into_one_buffer(official):
    header = safetensors.read_header(official)
    buffer = np.empty(max(entry.nbytes for entry in header.entries.values()), np.uint8)
    with safetensors.open_unchanged(header) as file:
        for key, wanted in TENSORS.items():
            tensor = safetensors.read_tensor(file, header, key, buffer)
            assert bits(tensor) == bits(wanted)
            assert not tensor.size or np.shares_memory(tensor, buffer)


BAD = {
    "empty file": (b"", "0 bytes are too few"),
    "no header": (struct.pack("<Q", 20), "claims 20 bytes but the file has 8"),
    "absurd size": (
        struct.pack("<Q", 2**63 + 5) + b"{}",
        "claims 9223372036854775813 bytes, safet",
    ),
    "size beyond the file": (struct.pack("<Q", 99_000_000) + b"{}", "claims 99000000 bytes but"),
    "not JSON": (layout(b'{"a": '), "not valid JSON"),
    "not an object": (layout(b"[1, 2]  "), "not a JSON object"),
    "not UTF-8": (layout(b'{"\xff": 1}'), "not valid JSON"),
    "nested too deep": (layout(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "huge number": (layout(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "NaN": (layout(b'{"a": NaN}'), "NaN is not JSON"),
    "key twice": (layout(b'{"a": 1, "a": 2}'), "key 'a' appears twice"),
    "entry is no object": (layout({"a": 5}), "tensor 'a': its header entry needs exactly"),
    "field missing": (layout({"a": {"dtype": "F32", "shape": []}}), "tensor 'a': its header entry"),
    "lone surrogate": (layout(b'{"\\ud800": 3}'), "tensor '\\ud800'"),
    "unknown type": (
        layout({"a": f32(1, at=0) | {"dtype": "F31"}}, bytes(4)),
        "tensor 'a': dtype 'F31' is unknown; known are BOOL",
    ),
    "negative size": (layout({"a": f32(1, at=0) | {"shape": [-1]}}, bytes(4)), "shape '[-1]'"),
    "size is true": (layout({"a": f32(1, at=0) | {"shape": [True]}}, bytes(4)), "shape '[True]'"),
    "size is 1.0": (layout({"a": f32(1, at=0) | {"shape": [1.0]}}, bytes(4)), "shape '[1.0]'"),
    "offsets reversed": (
        layout({"a": f32(1, at=0) | {"data_offsets": [4, 0]}}, bytes(4)),
        "[4, 0]",
    ),
    "overflowing shape": (
        layout({"a": f32(1, at=0) | {"shape": [2**62, 2**62]}}, bytes(4)),
        "needs '85070591730234615865843651857942052864' bytes, its offsets give '4'",
    ),
    "wrong number of bytes": (
        layout({"a": f32(2, at=0) | {"data_offsets": [0, 4]}}, bytes(4)),
        "tensor 'a': F32 of shape '[2]' needs '8' bytes, its offsets give '4'",
    ),
    "gap": (layout({"a": f32(1, at=0), "b": f32(1, at=8)}, bytes(12)), "leaves a gap after 'a'"),
    "overlap": (layout({"a": f32(2, at=0), "b": f32(2, at=4)}, bytes(12)), "overlaps with 'a'"),
    "truncated": (layout({"a": f32(2, at=0)}, bytes(7)), "should end at byte"),
    "bytes left over": (layout({"a": f32(2, at=0)}, bytes(9)), "the tensors end at byte"),
    "metadata of numbers": (layout({"__metadata__": {"a": 1}}), "__metadata__ is not a table"),
    "metadata of half a character": (layout({"__metadata__": {"a": "\ud800"}}), "__metadata__ is not valid Unicode"),
    "metadata named by half a character": (layout({"__metadata__": {"\udc00": "a"}}), "__metadata__ is not valid Uni"),
    "zip pickle": (b"PK\x03\x04" + bytes(60), "is a PyTorch pickle"),
    "plain pickle": (b"\x80\x02}q\x00X" + bytes(60), "is a PyTorch pickle"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "git lfs pull"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(case, tmp_path):
    content, wanted = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(AegisError) as error:
        safetensors.read_header(path)
    message = str(error.value)
    assert wanted in message
    assert str(path) in message
    assert "\n" not in message and len(message) < 400 + len(str(path))
    with pytest.raises((reference.SafetensorError, ValueError)):
        load_file(path)


def test_a_key_twice_among_many_is_found_at_once(tmp_path):
    path = tmp_path / "model.safetensors"
    keys = [f"{k:06d}" for k in range(200_000)] + ["199999"]
    path.write_bytes(layout(b"{" + ",".join(f'"{key}":0' for key in keys).encode() + b"}"))
    began = time.perf_counter()
    with pytest.raises(AegisError, match="key '199999' appears twice"):
        safetensors.read_header(path)
    assert time.perf_counter() - began < 20  # minutes if each key were counted by itself


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(AegisError, match="does not exist"):
        safetensors.read_header(tmp_path / "nothing.safetensors")
    with pytest.raises(AegisError, match="cannot read .*directory"):
        safetensors.read_header(tmp_path)


def test_a_file_that_changed_since_is_noticed(official):
    header = safetensors.read_header(official)
    content = official.read_bytes()
    official.write_bytes(content[:-1])
    with pytest.raises(AegisError, match="has changed since it was loaded"):
        with safetensors.open_unchanged(header):
            pass
    with open(official, "rb") as file, pytest.raises(AegisError, match="ends after"):
        last = max(header.entries.values(), key=lambda entry: entry.stop).key
        safetensors.read_tensor(file, header, last)
    official.write_bytes(content)
    os.utime(official, ns=(0, header.mtime_ns + 1))
    with pytest.raises(AegisError, match="has changed"):
        with safetensors.open_unchanged(header):
            pass


SMALL = layout(
    {"__metadata__": {"format": "pt"}, "w": f32(2, 2, at=0), "v": f32(3, at=16)},
    struct.pack("<7f", *range(7)),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, len(SMALL)),
    inserted=st.binary(max_size=3),
    place=st.integers(0, len(SMALL)),
)
@example(changes=[], cut=len(SMALL), inserted=b"", place=0)
def test_damage_is_an_error_or_an_exact_read(tmp_path_factory, changes, cut, inserted, place):
    content = bytearray(SMALL)
    for where, value in changes:
        content[where] = value
    content = bytes(content[:cut])
    content = content[:place] + inserted + content[place:]
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_all(path)
    except AegisError as error:
        assert "\n" not in str(error)
        return
    loaded = load_file(path)
    assert {k: bits(v) for k, v in tensors.items()} == {k: bits(v) for k, v in loaded.items()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, number):
    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "out.safetensors"
    with pytest.raises(AegisError, match="no space left while writing .*out.safetensors"):
        safetensors.write(path, [safetensors.Entry("a", "F32", (2,))], lambda key, rows: np.zeros(2, "f4"))
    assert os.listdir(tmp_path) == []


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    entries = [safetensors.Entry("a", "F32", (2,)), safetensors.Entry("b", "F32", (2,))]

    def part(key, rows):
        return np.zeros(2 if key == "a" else 3, np.float32)

    with pytest.raises(TypeError, match="announced"):
        safetensors.write(path, entries, part)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_dtype_names():
    assert safetensors.dtype_name("bfloat16") == "BF16"
    assert safetensors.dtype_name(np.float16) == "F16"
    for dtype in (np.int32, "float64", "no type", object()):
        with pytest.raises(AegisError, match="use float32, float16 or bfloat16"):
            safetensors.dtype_name(dtype)
