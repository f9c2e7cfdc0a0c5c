"""run/cache.py: where compiled programs are kept."""

import threading
import time
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


def test_one_compiles_and_those_beside_it_wait(unset, tmp_path):
    """Then all go on at once; without a cache nobody waits."""
    with cache.compiling():
        pass
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    order, first_is_in = [], threading.Event()

    def first():
        with cache.compiling():
            first_is_in.set()
            time.sleep(0.3)
            order.append("first")

    both = threading.Barrier(2, timeout=30)

    def other():
        first_is_in.wait(30)
        with cache.compiling():
            order.append("other")
            both.wait()  # both are inside

    threads = [threading.Thread(target=target) for target in (first, other, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert order == ["first", "other", "other"] and not both.broken
