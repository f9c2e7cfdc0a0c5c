"""`python -m benchmarks`: every script is listed and can be asked for its options."""

import importlib
import os
import re
import subprocess
import sys

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import trials

NAMES = benchmarks.names()


def test_the_list_has_a_line_for_every_script(capsys):
    benchmarks.main([])
    shown = capsys.readouterr().out
    assert len(NAMES) >= 9 and all(line and line in shown for line in NAMES.values())
    assert "cells" not in NAMES and "__main__" not in NAMES


def test_an_unknown_name():
    with pytest.raises(SystemExit, match="no benchmark 'atack'; did you mean attack"):
        benchmarks.main(["atack"])


@pytest.mark.parametrize("name", NAMES)
def test_options_of_each(name, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # some set what jax reads
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main([name, "--help"])
    assert stopped.value.code == 0
    assert "--out" in capsys.readouterr().out
    # What the script's own docstring tells to type is how it is started.
    assert f"python -m benchmarks {name}" in importlib.import_module(f"benchmarks.{name}").__doc__


def test_it_runs_from_a_shell():
    done = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=trials.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "step_vs_pytorch" in done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md", "docs/study.md", "docs/world.md"])
def test_commands_in_the_documents_exist(page):
    """`python -m benchmarks NAME`, with a space: a module of its own would do nothing."""
    text = (trials.ROOT / page).read_text("utf-8")
    assert "python -m benchmarks." not in text
    told = set(re.findall(r"python -m benchmarks (\w+)", text))
    assert told <= set(NAMES), told - set(NAMES)
