"""What `pip install` puts on a machine: the library, its configs, the world's weights, and nothing of the makers'."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "aegis_jax", "configs", "benchmarks", "tools", "tests")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """{name in the wheel: size}, built from a copy: setuptools writes beside what it builds."""
    copy, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "--wheel-dir", out, copy], check=True)
    (wheel,) = out.glob("aegis_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def test_the_library_its_configs_and_weights_are_in(content):
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "aegis_jax").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    wanted |= {f"aegis_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    assert sum("weights/" in name for name in wanted) > 15
    assert sorted(wanted - content.keys()) == []


def test_nothing_else_is_in(content):
    other = [name for name in content if not name.startswith("aegis_jax/") and ".dist-info/" not in name]
    assert other == []
    assert sum(content.values()) < 55 * 2**20


def test_the_command_is_there(content):
    assert any(name.endswith(".dist-info/entry_points.txt") for name in content)
