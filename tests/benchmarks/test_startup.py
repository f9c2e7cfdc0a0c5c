"""The start-up benchmark, with a stand-in for the erasure."""

import os
import sys

import pytest

from benchmarks import startup


def test_quick_processes(tmp_path):
    times = startup.measure(1, tmp_path, steps=False)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys(startup.QUICK, startup.QUICK_PER_ROUND)
    times |= {"first step, cold": [4.0], "first step, cached": [2.0]}
    assert "cold / cached: 2.00" in startup.text(times)


def test_until_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    script = "import sys, time; open(sys.argv[1], 'w').write('{}\\n'); time.sleep(600)"
    assert startup.until_line([sys.executable, "-c", script, file], file, dict(os.environ)) > 0
    with pytest.raises(SystemExit, match="before its first step: wrong"):
        command = [sys.executable, "-c", "import sys; sys.exit('wrong')"]
        startup.until_line(command, tmp_path / "none", dict(os.environ))
