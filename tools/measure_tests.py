"""Time and memory of the tests, module by module, in one process: `python -m tools.measure_tests [pytest's options]`.

Resident memory in MiB: when a module began, its largest, when its last test ended, and after what tests/conftest.py
clears between modules. The largest line of a worker is what `make test` needs; a module that ends high is what to cut.
"""

import sys
import time

import pytest

from benchmarks import trials

MIB = 2**20


class ByModule:
    def __init__(self):
        self.rows: list[list] = []
        self.began = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item):
        if self.began is None:
            trials.restart_high_water()
            self.began = time.perf_counter(), trials.memory("VmRSS")
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item, nextitem):
        ends = nextitem is None or nextitem.path != item.path
        before = trials.memory("VmRSS")
        result = yield
        if ends:
            (start, first), self.began = self.began, None
            sizes = [first, trials.memory("VmHWM"), before, trials.memory("VmRSS")]
            name = str(item.path.relative_to(trials.ROOT))
            self.rows.append([name, f"{time.perf_counter() - start:.1f}", *(f"{size / MIB:.0f}" for size in sizes)])
            print(f"\n{self.rows[-1]}", file=sys.stderr, flush=True)
        return result


def main(argv: list[str]) -> int:
    plugin = ByModule()
    code = pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", *argv], plugins=[plugin])
    head = ["module", "seconds", "at its start", "largest", "at its end", "after clearing"]
    print(trials.table(head, sorted(plugin.rows, key=lambda row: -float(row[1]))))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
