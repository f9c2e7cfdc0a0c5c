"""The progress line: step, rate, time left, loss. Plain lines where there is no terminal."""

import io
import os
import sys
import time

LINES = 10  # how many plain lines a whole run gets, besides the first


class Progress:
    """Shows how a run goes on `stream` (standard error by default)."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr or io.StringIO()  # None: it is closed (2>&-), and nobody reads
        self.is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._is_open = False  # a line that the next text overwrites

    def say(self, text: str) -> None:
        """One lasting line."""
        self.end()
        print(text, file=self._stream, flush=True)

    def end(self) -> None:
        """Ends a line that was being overwritten."""
        if self._is_open:
            print(file=self._stream, flush=True)
            self._is_open = False

    def start(self, done: int, steps: int, is_compiled: bool = False) -> None:
        """Called before step `done + 1` of `steps`; is_compiled: the first step takes no longer than the others."""
        self._first, self._steps = done, steps
        self._shown, self._part = 0.0, None
        self._clock = time.perf_counter() if is_compiled else None
        if not is_compiled:
            self._show("compiling (once; the next run finds it in the cache) ...")

    def update(self, step: int, loss: float) -> None:
        """Called after each step, or after some."""
        now = time.perf_counter()
        if self._clock is None:  # the first step's time is compilation
            self._clock, self._first = now, step
        rate = (step - self._first) / (now - self._clock) if step > self._first else None
        last = step == self._steps
        if self.is_terminal and not last and now - self._shown < 0.2:
            return
        part = step * LINES // self._steps
        if not self.is_terminal and not last and part == self._part:
            return
        self._part = part
        self._shown = now
        left = duration((self._steps - step) / rate) if rate else "?"
        speed = f"{rate:.2f} steps/s" if rate else "..."
        self._show(f"step {step}/{self._steps}  {speed}  {left} left  loss {loss:.3e}")
        if last:
            self.end()

    def _show(self, text: str) -> None:
        if self.is_terminal:
            # A line that wraps leaves its first row behind when it is overwritten.
            print(f"\r\033[K{text[: self._room()]}", end="", file=self._stream, flush=True)
            self._is_open = True
        else:
            print(text, file=self._stream, flush=True)

    def _room(self) -> int:
        """Letters that fit into a row; of a terminal that does not say how wide it is, 79."""
        try:
            width = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            width = 0
        return (width or 80) - 1


class Silent:
    """Shows nothing."""

    def say(self, text):
        pass

    end = start = update = lambda self, *args: None


def duration(seconds: float) -> str:
    """For people: 3 h 05 min, 2 min 10 s, 8 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
