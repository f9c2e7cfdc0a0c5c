"""Erase the texture "striped" from the embedded world, and the default there for every texture.

Command   aegis erase --config world_striped      (or: make erase CONCEPT=striped)
Hardware  2 CPU cores
Expected  see README.md, Results

As world_star, with a third of its pull: what the study found to erase "striped".
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "world"
    config.concepts = ("striped",)
    config.steps = 500
    config.batch = 4
    config.learning_rate = 1e-4
    config.trainable = "xattn"
    config.aet = {"init": "concept"}
    config.prompt = {"init": "random", "tokens": 4, "prefixes": 4}
    config.grp = {"retention": "constant", "weight": 3e-3}
    config.latents = {"refresh_every": 50}
    config.picture = {"guidance": 3.0}
    return config
