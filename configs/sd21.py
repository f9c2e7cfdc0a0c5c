"""Erase a concept from Stable Diffusion 2.1 with `paper`: AEGIS with the numbers of the paper's appendix.

Command   aegis erase --config sd21 --concept nudity --out runs/sd21_nudity
Hardware  one GPU; memory not measured (weights, drift, moments and gradient are some 20 GB by count)
Expected  not measured
Result    not measured
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "stabilityai/stable-diffusion-2-1"
    config.method = "paper"
    # The paper's settings of scale, stated although they are the defaults: this file is their record.
    config.steps = 1000
    config.batch = 1
    config.learning_rate = 1e-5  # Adam
    config.trainable = "full"
    config.latents = {"steps": 50, "refresh_every": 1}
    return config
