"""run/progress.py: what a user sees, with and without a terminal."""

import io
import os
import sys

import pytest

from aegis_jax.run import progress as progress_lib
from aegis_jax.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def a_terminal_that_can(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def clock(monkeypatch):
    """A clock that each look advances by half a second."""
    now = [0.0]

    def look():
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(progress_lib.time, "perf_counter", look)


def run(stream, steps=40, done=0):
    shown = Progress(stream)
    shown.start(done, steps)
    for step in range(done + 1, steps + 1):
        shown.update(step, 0.125)
    shown.say("the end")
    return stream.getvalue()


def test_plain_lines(clock):
    lines = run(io.StringIO()).splitlines()
    assert lines[0].startswith("compiling") and lines[-1] == "the end"
    assert 5 <= len(lines) <= 13
    assert lines[-2].startswith("step 40/40") and "0 s left" in lines[-2]
    assert "\r" not in "".join(lines)


def test_rate_and_time_left(clock):
    """One look a step: two steps a second, so 20 steps before the end 10 seconds are left."""
    text = run(Terminal())
    assert "step 20/40  2.00 steps/s  10 s left  loss 1.250e-01" in text
    # Compilation, the first step, counts for nothing.
    assert "step 1/40  ...  ? left" in text


def test_a_terminal_line_is_overwritten_and_ended(clock):
    text = run(Terminal())
    assert text.count("\n") == 2 and text.endswith("\nthe end\n")
    assert text.count("\r") == 41


@pytest.mark.parametrize(("columns", "longest"), [(40, 39), (0, 79)])
def test_a_line_is_cut_to_the_terminals_row(clock, monkeypatch, columns, longest):
    monkeypatch.setattr(Terminal, "fileno", lambda self: 5)
    monkeypatch.setattr(progress_lib.os, "get_terminal_size", lambda number: os.terminal_size((columns, 24)))
    monkeypatch.setattr(progress_lib, "duration", lambda seconds: "9" * 60)
    rows = run(Terminal()).split("\n")[0].split("\r\033[K")
    assert max(map(len, rows)) == longest


def test_a_terminal_that_understands_no_escapes_gets_plain_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert run(Terminal()) == run(io.StringIO()) and "\033" not in run(Terminal())


def test_where_standard_error_is_closed_nothing_is_said(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    shown = Progress()
    shown.start(0, 1)
    shown.update(1, 0.5)
    shown.say("the end")
    assert not shown.is_terminal and capsys.readouterr() == ("", "")


def test_a_resumed_run_counts_its_own_steps(clock):
    assert "step 40/40  2.00 steps/s" in run(io.StringIO(), done=30)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (7300, "2 h 01 min")]
)
def test_durations(seconds, text):
    assert progress_lib.duration(seconds) == text
