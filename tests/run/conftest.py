"""Fixtures for the tests of the run."""

import os

import pytest
from PIL import Image

from tests.run import runs, untrained


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """A folder for compiled programs, shared with the processes that tests start; not the user's."""
    from aegis_jax.run import cache

    os.environ["AEGIS_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    cache.enable()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small untrained pipeline as a diffusers folder; to be read only."""
    return untrained.write(tmp_path_factory.mktemp("untrained") / "pipeline")


@pytest.fixture
def pictures(tmp_path):
    """Three, and the index that `aegis sample` writes beside its own."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (90 * k, 9, 9)).save(folder / f"{k}.png")
    return folder


@pytest.fixture
def cheap_step(monkeypatch):
    """Puts the stand-in for the training step into `aegis_jax.run.erase`."""
    from aegis_jax.run.config import RunConfig

    monkeypatch.setattr(RunConfig, "method", untrained.METHOD)


@pytest.fixture
def finished(cheap_step, folder, tmp_path):
    runs.erase(folder, tmp_path / "finished")
    return tmp_path / "finished"


@pytest.fixture(autouse=True)
def python_handles_sigint():
    """A shell starts background jobs with SIGINT ignored; the tests expect what a person at a terminal has."""
    import signal

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
