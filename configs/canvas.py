"""Erase a concept from the canvas, the second embedded world.

Command   aegis erase --model canvas --concept fox
Hardware  2 CPU cores
Expected  docs/canvas.md

The scale is that of configs/world.py, chosen there; the preset is the one that keeps more here (docs/canvas.md).
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "canvas"
    config.method = "aegis+near"
    config.concepts = ("fox",)
    config.steps = 500
    config.batch = 4
    config.learning_rate = 1e-4
    config.trainable = "xattn"
    config.latents = {"refresh_every": 50}
    config.picture = {"guidance": 3.0, "images": 6}  # a column for each hand
    return config
