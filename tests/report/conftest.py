"""A reduced evaluation of the embedded world, made once: base and a closed form, an attack, a few pictures."""

import json

import pytest

from aegis_jax.cli import main
from tests.run.conftest import compilation_cache  # noqa: F401

ATTACKS = "ring-a-bell"
TINY = [
    "--attacks", ATTACKS, "--attack.ring-a-bell.generations=4", "--attack.ring-a-bell.population=8",
    "--baselines", "uce", "--images", "2", "--cases", "4", "--seeds", "1",
]  # fmt: skip


def command(out):
    return ["evaluate", "--base", "world", "--concept", "star", *TINY, "--out", str(out)]


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory, compilation_cache):  # noqa: F811
    """Its folder; to be read only."""
    out = tmp_path_factory.mktemp("evaluation") / "star"
    assert main(command(out)) == 0
    return out


@pytest.fixture(scope="session")
def report(evaluation):
    return json.loads((evaluation / "report.json").read_text())
