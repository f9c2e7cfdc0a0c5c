"""Erase the texture "striped" from the embedded world, and the default there for every texture.

Command   aegis erase --config world_striped      (or: make erase CONCEPT=striped)
Hardware  2 CPU cores
Expected  the time of world_star
Result    docs/study.md, screening only (one seed, 64 images a figure): 0 % plain, 2 %
          for synonyms, 19 % under attack, 92 % of the other textures kept

As world_star, but for what the study found to erase a texture: a prefix of one token and an omega that
grows from 0 to 1, at twice the rate.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "world"
    config.concepts = ("striped",)
    config.steps = 250
    config.batch = 4
    config.learning_rate = 2e-4
    config.trainable = "xattn"
    config.aet = {"init": "concept"}
    config.prompt = {"init": "mean"}
    config.grp = {"omega_rule": "linear", "omega": 0.0, "mu": 4e-3}
    config.latents = {"refresh_every": 50}
    config.picture = {"guidance": 3.0}
    return config
