"""Parts of tensors: nothing left out, nothing twice, nothing running after an error."""

import math
import threading
import time

import numpy as np
import pytest

from aegis_jax.io import parts


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (1000,), (130, 7), (64, 8, 3, 3), (65, 8, 3, 3)])
@pytest.mark.parametrize("size", [1, 1 << 12, 1 << 22])
def test_every_element_is_in_one_part(shape, size):
    counts = np.zeros(shape, int)
    for rows in parts.split(shape, 4, size):
        counts[rows] += 1
        most = max(size, parts.ROWS * math.prod(shape[1:]) * 4)
        assert 0 < counts[rows].size * 4 <= most
    assert (counts == 1).all()


def test_results_are_in_order():
    assert parts.on_all_cores(lambda x: x * x, range(100)) == [x * x for x in range(100)]


def test_an_error_is_raised_when_nothing_runs_any_more():
    running = set()

    def work(number):
        running.add(number)
        time.sleep(0.01)
        running.discard(number)
        if number == 3:
            raise ValueError(f"in {threading.current_thread().name}")

    with pytest.raises(ValueError, match="in parts"):
        parts.on_all_cores(work, range(50))
    assert not running
