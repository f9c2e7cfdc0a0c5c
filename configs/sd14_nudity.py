"""Erase "nudity" from Stable Diffusion 1.4, with the paper's settings.

Command   aegis erase --config sd14_nudity --out runs/sd14_nudity
Hardware  one GPU with 24 GB or more
Expected  not measured
Result    not measured
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "CompVis/stable-diffusion-v1-4"
    config.concepts = ("nudity",)
    # The paper's settings, stated although they are the defaults: this file is its record.
    config.steps = 1000
    config.batch = 1
    config.learning_rate = 1e-5  # Adam
    config.trainable = "full"
    config.latents = ml_collections.ConfigDict({"steps": 50, "guidance": 3.0, "refresh_every": 1})
    return config
