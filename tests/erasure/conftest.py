"""One pipeline for all tests of the step: the fewest layers that still have cross-attention, for fast compilation."""

import functools

import pytest

import aegis_jax
from tests.tiny import FEWEST


@pytest.fixture(scope="session")
def fewest(tiny):
    """fewest(**options) -> the folder of such a pipeline, with further options of tests/tiny.py."""
    return functools.partial(tiny, **FEWEST)


@pytest.fixture(scope="session")
def folder(fewest):
    return fewest()


@pytest.fixture(scope="session")
def pipeline(folder):
    return aegis_jax.load_pipeline(folder)
