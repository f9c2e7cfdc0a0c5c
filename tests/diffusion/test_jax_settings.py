"""JAX settings that users have in their environment change nothing: no other dtype, no other draw, no refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aegis_jax
from aegis_jax.models import blockwise

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return SETTINGS[request.param]


def everything(pipeline):
    """What the public functions give, in float32 or uint8, for inputs as users have them (NumPy's float64)."""
    rng = np.random.default_rng(0)
    text = aegis_jax.encode_text(pipeline, ["a red star", "a dog"])
    latents = rng.standard_normal((2, 8, 8, 4))
    found = {
        "text": text,
        "noise": aegis_jax.predict_noise(pipeline, latents, [3, 500], np.asarray(text, np.float64)),
        "decoded": aegis_jax.decode(pipeline, latents),
        "one seed": aegis_jax.sample(pipeline, ["a red star", "a dog"], steps=1, seed=5),
        "seeds": aegis_jax.sample(pipeline, ["a red star", "a dog"], steps=1, seed=[2**32 - 1, 7]),
    }
    return {name: (np.asarray(value), value.dtype) for name, value in found.items()}


@pytest.fixture(scope="module")
def plain(tiny):
    return everything(aegis_jax.load_pipeline(tiny()))


def test_results_are_the_same(tiny, plain, setting):
    with setting():
        found = everything(aegis_jax.load_pipeline(tiny()))
    for name, (value, dtype) in plain.items():
        assert found[name][1] == dtype, name
        np.testing.assert_array_equal(found[name][0], value, err_msg=name)


def test_attention_in_blocks(setting):
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 1, 8)).astype(np.float32)
    gradient = jax.grad(lambda *qkv: blockwise.attention(*qkv).sum(), (0, 1, 2))
    wanted = gradient(q, k, v)
    with setting():
        found = gradient(q, k, v)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs)
