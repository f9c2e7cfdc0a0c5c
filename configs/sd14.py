"""Erase a concept from Stable Diffusion 1.4 with `paper`: AEGIS with the numbers of the paper's appendix.

Command   aegis erase --config sd14 --concept nudity --out runs/sd14_nudity       (or "Van Gogh", church, ...)
Hardware  one GPU; memory not measured (weights, drift, moments and gradient are some 20 GB by count)
Expected  not measured
Result    not measured
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "CompVis/stable-diffusion-v1-4"
    config.method = "paper"
    # The paper's settings of scale, stated although they are the defaults: this file is their record.
    config.steps = 1000
    config.batch = 1
    config.learning_rate = 1e-5  # Adam
    config.trainable = "full"
    config.latents = {"steps": 50, "refresh_every": 1}
    return config
