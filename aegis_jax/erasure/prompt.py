"""The adversarial prompt c* (method.md 3.3): a learnable prefix that brings the concept back in the current model."""

import jax.numpy as jnp

from aegis_jax.erasure.programs import given
from aegis_jax.erasure.target import sign_step


def update_prompt(frozen, theta, template, p, z_t, t, eps_original, *, gamma, remat: bool):
    """One step of the adversarial prefix: (new p (G, k, d), A).

    theta: the current UNet parameters; template: the concepts' token embeddings, (G, L, d); eps_original: theta0's
    predictions for each latent's concept, (B, h, w, C).
    """
    # Two goals of which the second has no weight: the shape that the AET's program is compiled for.
    p, value, _ = sign_step(
        frozen.unet_graph,
        theta,
        frozen.text_graph,
        frozen.text,
        frozen.schedule,
        template,
        p,
        z_t,
        t,
        jnp.stack([eps_original, eps_original]),
        given([1.0, 0.0]),
        given(gamma),
        remat=remat,
    )
    return p, value
