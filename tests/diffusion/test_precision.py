"""Whatever asks a network for float32 gets its products in full: sampling, decoding, single predictions, attacks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.attacks import images, prompt, rows
from aegis_jax.attacks.soft_prompt import SoftPromptConfig, first_rows, networks
from aegis_jax.diffusion import sample as lib
from aegis_jax.diffusion import schedule
from aegis_jax.diffusion.conditioning import encode
from aegis_jax.io.pipeline import load_pipeline

pytest.importorskip("torch")  # tests/tiny.py writes the pipelines with it


@pytest.fixture(scope="module")
def pipeline(tiny):
    return load_pipeline(tiny())


def products(jitted, *args, **kwargs):
    """The lines of the products in a program as it is handed to the compiler."""
    text = jitted.lower(*args, **kwargs).as_text()
    found = re.findall(r"stablehlo\.(?:dot_general|convolution)[^\n]*", text)
    assert len(found) > 10
    return found


def programs(pipeline):
    unet, noise = pipeline.unet, schedule.make_schedule(pipeline.scheduler)
    cond, z = encode(pipeline, ["a star"]), jnp.zeros((1, 8, 8, 4))
    span = jnp.zeros(2, jnp.int32), jnp.float32(3)
    yield "predict_noise", lib._epsilon, (unet.graph, unet.params, noise, z, jnp.zeros(1, jnp.int32), cond), {}
    args = unet.graph, unet.params, noise, cond, cond, z, jnp.zeros(1000, jnp.int32), jnp.int32(20), *span
    yield "sample", lib._denoise, args, {}
    yield "decode", lib._decode, (pipeline.vae.graph, pipeline.vae.params, z, jnp.float32(1)), {}
    pictures = jnp.zeros((1, 16, 16, 3))
    yield "encode pictures", images._encode_images, (pipeline.vae.graph, pipeline.vae.params, pictures), {}
    config = SoftPromptConfig(restarts=1, steps=1, batch=1)
    gap = prompt.template(pipeline.tokenizer, "star", config.place, config.tokens)
    net, start = networks(pipeline, "star"), first_rows(pipeline, {"": config}, {"": gap})
    args = net, start, rows._adam.init(start.soft), z, jax.random.key(0), jnp.int32(0), np.float32(1)
    yield "attack", rows._steps, args, {"batch": 1, "chunk": 1, "remat": False}


def test_products_are_taken_in_full(pipeline):
    for name, jitted, args, kwargs in programs(pipeline):
        lines = products(jitted, *args, **kwargs)
        assert all("HIGHEST" in line for line in lines), name


def test_the_users_own_precision_stands(pipeline):
    with jax.default_matmul_precision("default"):
        _, jitted, args, kwargs = next(programs(pipeline))
        assert not any("HIGHEST" in line for line in products(jitted, *args, **kwargs))
