"""The same small pipeline as in the tests of the run."""

from tests.run.conftest import compilation_cache, folder, python_handles_sigint  # noqa: F401
