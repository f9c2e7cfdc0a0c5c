"""Fixtures for the tests of attacks."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory):
    """A folder for searches that are kept; not the user's."""
    os.environ["AEGIS_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
