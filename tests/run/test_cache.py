"""run/cache.py: where compiled programs are kept."""

import os
from pathlib import Path

import jax
import pytest

from aegis_jax.run import cache


@pytest.fixture
def unset(monkeypatch):
    """No cache chosen yet; whatever the test chooses is undone."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("AEGIS_CACHE_DIR")
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_in_the_users_cache_folder(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache.enable()
    assert Path(jax.config.jax_compilation_cache_dir) == tmp_path / "aegis_jax"


def test_ours_by_environment(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("AEGIS_CACHE_DIR", str(tmp_path / "here"))
    cache.enable()
    assert Path(jax.config.jax_compilation_cache_dir) == tmp_path / "here"


def test_jaxs_own_choice_stays(unset, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    monkeypatch.setenv("AEGIS_CACHE_DIR", str(tmp_path / "here"))
    cache.enable()
    assert Path(jax.config.jax_compilation_cache_dir) == tmp_path / "jax"


def test_a_user_without_a_home_is_no_error(unset, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "~")  # what Python is left with for a user that is in no list of users
    cache.enable()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_is_no_error(unset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AEGIS_CACHE_DIR", str(tmp_path / "file" / "here"))
    cache.enable()
    assert jax.config.jax_compilation_cache_dir is None


def test_what_compiles_does_so_in_turn(unset, tmp_path):
    """Another process of this host with the same cache waits; without a cache nobody does."""
    fcntl = pytest.importorskip("fcntl")
    with cache.in_turn():  # no cache
        pass
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))

    def is_free():
        other = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(other)
        return True

    with cache.in_turn():
        assert not is_free()
    assert is_free()
