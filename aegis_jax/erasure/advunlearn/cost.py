"""How many UNet evaluations AdvUnlearn takes, from its settings alone; units as in aegis/cost.py."""

from aegis_jax.erasure import trainable
from aegis_jax.erasure.advunlearn.config import AdvUnlearnConfig
from aegis_jax.erasure.advunlearn.setup import NEUTRAL, uses_pool
from aegis_jax.erasure.aegis.cost import BACKWARD_TO_ALL, BACKWARD_TO_TEXT, Cost
from aegis_jax.erasure.latents import TRAJECTORIES


def unet_evaluations(config: AdvUnlearnConfig, concepts: int = 1) -> Cost:
    """What a run takes per step, on average. Which of the neutral prompts a tokenizer knows the settings do not say:
    all are counted."""
    attacks = (config.steps - config.warm_up) / config.steps * config.attack.steps
    sizes = {"erase": concepts, "retain": len(config.retain.prompts) or len(NEUTRAL)}
    backward = BACKWARD_TO_TEXT if config.trainable == trainable.TEXT_ENCODER else BACKWARD_TO_ALL
    guided, kept = 2, config.retain.batch
    visits = {"erase": -(-config.steps // concepts), "retain": -(-config.steps * kept // sizes["retain"])}
    after = {"erase": config.latents.refresh_every, "retain": config.latents.refresh_every * kept}
    fresh = {"erase": (1 + attacks) * config.batch, "retain": kept}
    latents = 0.0
    for name, size in sizes.items():
        if uses_pool(config, size):
            drawn = size * (1 + (visits[name] - 1) // after[name])
            latents += drawn * TRAJECTORIES * guided * config.latents.steps / config.steps
        else:
            latents += fresh[name] * guided * (config.latents.steps - 1) / 2
    return Cost(
        latents=latents,
        # theta0 for c_e, theta for c*(p) with its gradient.
        soft=config.batch * attacks * (2 + BACKWARD_TO_TEXT),
        # theta0 for c_e and c_0, theta for c* with its gradient.
        erasure=config.batch * (2 + 1 + backward),
        words=kept * (1 + 1 + backward),
    )
