"""AET: the adversarial erasure target c' (method.md 3.2), and the sign step that c' and c* share.

Both are soft prompts that one sign step moves towards given noise predictions of *some* UNet:
  c': eps(theta0, z_t, t, c'(v)) towards eps(theta, c_e) (weight +1 or -1) and eps(theta0, c_e);
  c*: eps(theta,  z_t, t, c*(p)) towards eps(theta0, c_e)      (prompt.py).
One compiled program serves both when the number of soft tokens agrees. In a batch of G concepts each has soft tokens
of its own, which answer for its own latents only: every G-th one (networks.py).
"""

import jax
import jax.numpy as jnp

from aegis_jax.erasure.networks import encode_soft, mean_square, predict
from aegis_jax.erasure.programs import given, program


@program(static_argnames=("unet_graph", "text_graph", "remat"))
def sign_step(
    unet_graph,
    unet_params,
    text_graph,
    text_params,
    schedule,
    template,
    soft,
    z_t,
    t,
    goals,
    weights,
    size,
    *,
    remat: bool = False,
):
    """soft - size * sign(gradient of J), J = sum_i weights_i ||eps(c(soft)) - goals_i||^2, for each concept by itself.

    Args: soft (G, n, d); template (G, L, d); goals (I, B, h, w, C); weights (I,); size: the step, scalar.
    Returns (new soft tokens (G, n, d), the concepts' mean J at the old ones, float32 scalar, J's gradients (G, n, d)).
    """
    concepts = soft.shape[0]

    def distance(soft):
        c = encode_soft(text_graph, text_params, template, soft)
        eps = predict(unet_graph, unet_params, schedule, z_t, t, c, remat=remat)
        to_goals = jax.vmap(lambda eps, goal: mean_square(eps - goal), in_axes=(None, 0))
        own = [jnp.sum(weights * to_goals(eps[i::concepts], goals[:, i::concepts])) for i in range(concepts)]
        # Soft tokens of one concept do not reach another's latents, so the sum's gradient is each one's own.
        return sum(own), sum(own) / concepts

    gradient, value = jax.grad(distance, has_aux=True)(soft)
    return soft - size * jnp.sign(gradient), value, gradient


def update_target(frozen, v, z_t, t, eps_current, eps_original, *, beta, current_weight, remat: bool):
    """One step of the AET: (new v (G, m', d), J).

    eps_current, eps_original: predictions of theta and theta0 for the concept, (B, h, w, C), not differentiated.
    """
    v, value, _ = sign_step(
        frozen.unet_graph,
        frozen.unet,
        frozen.text_graph,
        frozen.text,
        frozen.schedule,
        # As many as there are prompt templates, so that the prompt's program fits.
        jnp.broadcast_to(frozen.target_template, (v.shape[0], *frozen.target_template.shape[1:])),
        v,
        z_t,
        t,
        jnp.stack([eps_current, eps_original]),
        given([current_weight, 1.0]),
        given(beta),
        remat=remat,
    )
    return v, value
