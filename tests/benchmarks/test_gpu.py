"""The scripts for a GPU on a CPU, with a tiny network: what they print is no time, but it comes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(module, *arguments):
    command = [sys.executable, "-m", "benchmarks", module, "--tiny", "--repeats", "1", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=300)


@pytest.mark.slow
def test_gpu_first(tmp_path):
    run("gpu_first", "--only", "1234567", "--convolutions", "1", "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    failed = [name for name, x in found.items() if "failed" in x and "cudnn" not in name]
    assert not failed
    for name in ("2 F, batch 2", "3 F + B to the text", "3 F + B to all weights", "5 GRP + Adam"):
        assert found[name]["ms"] > 0
        kernels = json.loads(next(tmp_path.glob(f"{name[:3].replace(' ', '_')}*.kernels.json")).read_text())
        assert kernels and found[f"7 {name}, ms of kernels"]["whole"] > 0


@pytest.mark.slow
def test_gpu_variants(tmp_path):
    run("gpu_variants", "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"as it is", "one pass", "OHWI"} <= set(found)
    assert all(found[name]["relative difference"] < 1e-5 for name in ("one pass", "OHWI"))
