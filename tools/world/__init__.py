"""Trains the embedded world: `python -m tools.world.train --out DIR`."""
