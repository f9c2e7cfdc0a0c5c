"""The one way to ask a UNet: what sampling, erasure, attacks and checks all call, so that its rules hold for each.

The network computes in its parameters' dtype; what comes back is float32.
Shapes: B latents, h w latent size, C channels, G rows of conditioning, dealt to the latents in turn.
"""

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.conditioning import Conditioning, per_latent
from aegis_jax.diffusion.schedule import Schedule, to_epsilon
from aegis_jax.models import unet


def output(graph, params, z_t, t, cond: Conditioning, *, remat: bool = False):
    """The raw output (noise or v, as the scheduler's prediction type says), float32 (B, h, w, C).

    z_t (B, h, w, C); t (B,) or scalar; cond: G rows, latent i has row i mod G; remat as in `unet.apply`.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    embedding = per_latent(cond.embedding, z_t.shape[0]).astype(dtype)
    return unet.apply(graph, params, z_t.astype(dtype), t, embedding, remat=remat).astype(jnp.float32)


def predict(graph, params, schedule: Schedule, z_t, t, cond: Conditioning, *, remat: bool = False):
    """Predicted noise, float32 (B, h, w, C): v-predictions are converted, so that every distance is one of noises."""
    return to_epsilon(schedule, output(graph, params, z_t, t, cond, remat=remat), z_t, t)
