"""The benchmarks are scripts: their folder is on the path, as when one of them is started."""

import pathlib
import sys

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))
