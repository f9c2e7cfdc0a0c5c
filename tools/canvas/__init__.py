"""Trains the canvas, the second embedded world: `python -m tools.canvas.train --out DIR`."""
