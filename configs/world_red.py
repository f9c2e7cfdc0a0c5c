"""Erase the colour "red" from the embedded world, and the default there for every colour.

Command   aegis erase --config world_red      (or: make erase CONCEPT=red)
Hardware  2 CPU cores
Expected  half the time of world_star
Result    docs/study.md, Finals: worse than ESD

As world_star, but for what the study found to erase a colour: the plain method with a prefix of one
token and the hypergradient rule, at a higher rate. Four tokens before a colour leave it in the model.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "world"
    config.concepts = ("red",)
    config.steps = 250
    config.batch = 4
    config.learning_rate = 3e-4
    config.trainable = "xattn"
    config.aet = {"init": "mean"}
    config.prompt = {"init": "mean"}
    config.grp = {"omega_rule": "hypergradient", "omega": 0.0}
    config.latents = {"refresh_every": 50}
    config.picture = {"guidance": 3.0}
    return config
