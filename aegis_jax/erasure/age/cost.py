"""How many UNet evaluations AGE takes, from its settings alone; units as in aegis/cost.py."""

from aegis_jax.erasure.aegis.cost import BACKWARD_TO_ALL, BACKWARD_TO_TEXT, Cost
from aegis_jax.erasure.age.config import AgeConfig
from aegis_jax.erasure.age.setup import uses_pool
from aegis_jax.erasure.latents import TRAJECTORIES


def unet_evaluations(config: AgeConfig, concepts: int = 1) -> Cost:
    """What a run takes per step, on average."""
    guided, draw = 2, 2 * config.batch * (config.latents.steps - 1) / 2
    own = 2 * draw
    if uses_pool(config, concepts):
        visits = -(-config.steps // concepts)
        filled = concepts * (1 + (visits - 1) // config.latents.refresh_every)
        own = filled * TRAJECTORIES * guided * config.latents.steps / config.steps
    return Cost(
        latents=own + 2 * draw,  # of the targets always fresh
        # theta for c_e; theta0 at both latents and theta, with their gradients.
        soft=config.batch * (1 + 3 * (1 + BACKWARD_TO_TEXT)),
        # theta0 for c_e, and for c_t there and at its own latents; theta for both with its gradient.
        erasure=config.batch * (3 + 2 * (1 + BACKWARD_TO_ALL)),
        words=0.0,
    )
