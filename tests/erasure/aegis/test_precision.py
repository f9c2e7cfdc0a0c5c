"""Float32 means float32 on every backend: XLA would take TF32 on GPUs and bfloat16 on TPUs."""

import re

import jax
import jax.numpy as jnp

from aegis_jax.diffusion.conditioning import encode_soft
from aegis_jax.diffusion.predict import predict
from aegis_jax.erasure.aegis.config import EraseConfig
from aegis_jax.erasure.aegis.setup import freeze


def _precisions(pipeline, dtype):
    """What the products of a UNet's prediction and its gradient, and of the text encoder, ask the backend for."""
    frozen = freeze(pipeline, ["star"], EraseConfig(compute_dtype=dtype))

    def loss(soft):
        cond = encode_soft(frozen.text_graph, frozen.text, frozen.target_template, soft)
        z, t = jnp.zeros((1, *frozen.latent_shape)), jnp.zeros(1, jnp.int32)
        return predict(frozen.unet_graph, frozen.unet, frozen.schedule, z, t, cond).sum()

    soft = jnp.zeros((1, 1, frozen.target_template.shape[-1]))
    text = jax.jit(jax.grad(loss)).lower(soft).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution)[^\n]*", text)
    assert len(products) > 20
    return [line.count("HIGHEST") > 0 for line in products], ["bf16" in line for line in products]


def test_float32_is_asked_for_in_full(pipeline):
    highest, _ = _precisions(pipeline, "float32")
    assert all(highest), highest


def test_bfloat16_is_left_alone(pipeline):
    highest, is_bfloat16 = _precisions(pipeline, "bfloat16")
    assert any(is_bfloat16) and all(h != b for h, b in zip(highest, is_bfloat16, strict=True))


def test_the_users_own_precision_stands(pipeline):
    with jax.default_matmul_precision("default"):
        highest, _ = _precisions(pipeline, "float32")
    assert not any(highest)
