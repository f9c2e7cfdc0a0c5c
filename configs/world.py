"""Erase a concept from the embedded world: the demonstration, and the default for the world.

Command   aegis erase --model world --concept star        (or: make erase)
Hardware  2 CPU cores
Expected  see README.md, Results

Not the paper's setting: of a small UNet with 8x8 latents the cross-attention alone is trained, at a higher rate, with a
batch of 4 and latents from a buffer of 8 trajectories, redrawn with the current weights every 50 steps (the paper
trains the whole UNet at 1e-5 and draws a trajectory for every step). There are four adversarial prefixes of four tokens
each, which start at random words; every other latent has the concept among random words instead, which in the last
third of the steps is pushed away the harder the more of it is left. What random words and the empty prompt draw is
preserved, instead of the paper's penalty on the distance to the original weights. Chosen by docs/study.md.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "world"
    config.concepts = ("star",)
    config.steps = 500
    config.batch = 4
    config.learning_rate = 1e-4
    config.trainable = "xattn"
    config.aet = {"init": "concept"}
    config.prompt = {"init": "random", "tokens": 4, "prefixes": 4, "gamma": 5e-3, "context": True, "context_rate": 0.5}
    config.grp = {"retention": "none"}
    config.preserve = {"weight": 5.0, "empty": 0.35}
    config.latents = {"refresh_every": 50}
    # For one concept 16 images, as many as the judging samples at a time on a CPU: one program for both.
    config.picture = {"guidance": 3.0, "images": 4}
    return config
