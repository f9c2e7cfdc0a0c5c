"""AET: the adversarial erasure target c' (method.md 3.2), and the sign step that c' and c* share.

Both are soft prompts that one sign step moves towards given noise predictions of *some* UNet:
  c': eps(theta0, z_t, t, c'(v)) towards eps(theta, c_e) (weight +1 or -1) and eps(theta0, c_e);
  c*: eps(theta,  z_t, t, c*(p)) towards eps(theta0, c_e)      (prompt.py).
One compiled program serves both when the number of soft tokens agrees.
"""

from functools import partial

import jax
import jax.numpy as jnp

from aegis_jax.erasure.networks import encode_soft, mean_square, predict


@partial(jax.jit, static_argnames=("unet_graph", "text_graph"))
def sign_step(unet_graph, unet_params, text_graph, text_params, schedule, template, soft, z_t, t, goals, weights, size):
    """soft - size * sign(gradient of J), J = sum_i weights_i ||eps(c(soft)) - goals_i||^2.

    Args: soft (n, d); template (1, L, d); goals (I, B, h, w, C); weights (I,); size: the step, scalar.
    Returns (new soft tokens (n, d), J at the old ones, float32 scalar, gradient (n, d)).
    """

    def distance(soft):
        c = encode_soft(text_graph, text_params, template, soft)
        eps = predict(unet_graph, unet_params, schedule, z_t, t, c)
        return jnp.sum(weights * jax.vmap(lambda goal: mean_square(eps - goal))(goals))

    value, gradient = jax.value_and_grad(distance)(soft)
    return soft - size * jnp.sign(gradient), value, gradient


def update_target(frozen, v, z_t, t, eps_current, eps_original, *, beta, current_weight):
    """One step of the AET: (new v (m', d), J).

    eps_current, eps_original: predictions of theta and theta0 for the concept, (B, h, w, C), not differentiated.
    """
    v, value, _ = sign_step(
        frozen.unet_graph,
        frozen.unet,
        frozen.text_graph,
        frozen.text,
        frozen.schedule,
        frozen.target_template,
        v,
        z_t,
        t,
        jnp.stack([eps_current, eps_original]),
        jnp.array([current_weight, 1.0], jnp.float32),
        jnp.float32(beta),
    )
    return v, value
