"""Erase a concept from the embedded world: the demonstration, and the default for the world.

Command   aegis erase --model world --concept star        (or: make erase)
Hardware  2 CPU cores
Expected  see README.md, Results

The scale is not the paper's: of a small UNet with 8x8 latents the cross-attention alone is trained, at a higher rate,
with a batch of 4 and latents from a pool of 8 trajectories, redrawn with the current weights every 50 steps (the paper
trains the whole UNet at 1e-5 and draws two trajectories for every step). Any preset runs at this scale:
`--config.method=esd`, `--config.method=paper`. Chosen by docs/study.md.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "world"
    config.method = "aegis+"
    config.concepts = ("star",)
    config.steps = 500
    config.batch = 4
    config.learning_rate = 1e-4
    config.trainable = "xattn"
    config.latents = {"refresh_every": 50}
    # For one concept 16 images, as many as the judging samples at a time on a CPU: one program for both.
    config.picture = {"guidance": 3.0, "images": 4}
    return config
