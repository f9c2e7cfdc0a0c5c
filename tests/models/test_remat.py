"""`unet.apply(..., remat=True)` gives the same numbers. That it saves memory, only accelerators' compilers show: XLA's
CPU backend undoes it (tests/plan/test_compiled.py)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.models import model, unet

CONFIG = {
    "block_out_channels": [16],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "cross_attention_dim": 20,
}


def loss(params, text, graph, sample, remat):
    return jnp.mean(jnp.square(unet.apply(graph, params, sample, jnp.array([500]), text, remat=remat)))


def test_values_and_gradients_are_the_same():
    network = model.abstract(unet.UNet2DConditionModel, CONFIG)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(lambda leaf: 0.2 * draw(*leaf.shape), network.params)
    sample, text = draw(1, 4, 4, 4), draw(1, 7, 20)

    def gradients(remat):
        f = partial(loss, graph=network.graph, sample=sample, remat=remat)
        return jax.value_and_grad(f, argnums=(0, 1))

    # Only with it is any block computed again.
    count = [str(jax.make_jaxpr(gradients(remat))(params, text)).count("= remat2[") for remat in (False, True)]
    assert count[0] == 0 and count[1] == 9  # 5 resnets and 4 transformers, in the backward pass
    kept, recomputed = (jax.jit(gradients(remat))(params, text) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * float(np.abs(a).max()))
