"""The judges of the canvas: thing, style and subgroup, a group of labels each."""

import functools

from aegis_jax.judges import world

load = functools.partial(world.load, within="canvas")
