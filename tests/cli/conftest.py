"""The same small pipeline as in the tests of the run."""

from tests.run.conftest import cheap_step, compilation_cache, folder  # noqa: F401
