"""The parts that the benchmarks share. No times are asserted anywhere in this folder."""

import json
import sys

import pytest

from benchmarks import trials


def test_alternate_runs_in_turn_and_keeps_every_report(tmp_path):
    log = tmp_path / "log"
    script = "import sys, json; open(sys.argv[1], 'a').write(sys.argv[2]); print('RESULT ' + json.dumps({'x': 1.5}))"
    commands = {name: [sys.executable, "-c", script, log, name] for name in "AB"}
    results = trials.alternate(commands, 2, say=False)
    assert log.read_text() == "ABAB"
    assert results == {"A": [{"x": 1.5}] * 2, "B": [{"x": 1.5}] * 2}


def test_a_failed_trial_ends_the_benchmark():
    with pytest.raises(SystemExit, match="code 3"):
        trials.trial([sys.executable, "-c", "import sys; sys.exit(3)"])


def test_spread_and_ratio():
    assert trials.spread([4.0]) == {"median": 4.0, "p10": 4.0, "p90": 4.0, "n": 1}
    found = trials.spread(range(11))
    assert (found["median"], found["p10"], found["p90"]) == (5, 1, 9)
    ratio = trials.ratio([{"x": 2.0}, {"x": 9.0}], [{"x": 1.0}, {"x": 3.0}], "x")  # within each round
    assert ratio["median"] == 2.5


def test_table_and_about(tmp_path):
    assert trials.table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    trials.write(tmp_path / "deep" / "r.json", {"about": trials.about()})
    about = json.loads((tmp_path / "deep" / "r.json").read_text())["about"]
    assert about["cpu"] and about["versions"]["jax"]
