"""Runs eight_lanes.py in a process of its own."""

import pathlib

from tests.multidevice.test_erase_step import run

HERE = pathlib.Path(__file__).parent


def test_lanes_on_eight_virtual_devices():
    run(HERE / "eight_lanes.py")
