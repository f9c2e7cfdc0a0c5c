"""Which attention runs where, and that the TPU's kernel computes the same."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from aegis_jax.models import attend as lib
from aegis_jax.models import model, unet


def tokens(length, head_dim, dtype=jnp.bfloat16, heads=2):
    rng = np.random.default_rng(length + head_dim)
    return [jnp.asarray(rng.normal(size=(1, length, heads, head_dim)), dtype) for _ in range(3)]


def test_flash_is_attention():
    """Output and gradients in the interpreter, a head of 40 padded to 128 lanes."""
    q, k, v = tokens(256, 40)
    weight = tokens(256, 40)[0].astype(jnp.float32) + 0.5

    def value_and_gradients(attention):
        f = lambda q, k, v: jnp.sum(weight * attention(q, k, v).astype(jnp.float32))  # noqa: E731
        return attention(q, k, v), *jax.grad(f, argnums=(0, 1, 2))(q, k, v)

    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradients(lib._flash)
    for a, b in zip(found, value_and_gradients(jax.nn.dot_product_attention), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize("queries, keys", [(1024, 77), (1023, 1024), (1031, 1031)])
def test_cpu_runs_xla_bit_for_bit(queries, keys):
    """Cross-attention, short sequences, and those that no block divides."""
    (q, *_), (_, k, v) = tokens(queries, 8, heads=1), tokens(keys, 8, heads=1)
    gradients = lambda f: jax.grad(lambda *x: f(*x).astype(jnp.float32).std(), argnums=(0, 1, 2))  # noqa: E731
    for wrap in (lambda f: f, gradients):
        found, wanted = (jax.jit(wrap(f))(q, k, v) for f in (lib.attend, jax.nn.dot_product_attention))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    "query, keys, dtype, options, kernel",
    [
        (1024, 1024, jnp.bfloat16, {}, True),
        (2304, 2304, jnp.bfloat16, {}, True),  # 48 x 48: in tiles of 256
        (256, 256, jnp.bfloat16, {}, False),  # short
        (1024, 77, jnp.bfloat16, {}, False),  # cross-attention
        (1100, 1100, jnp.bfloat16, {}, False),  # no tile divides it
        (1024, 1024, jnp.float32, {}, False),
        (1024, 1024, jnp.bfloat16, {"flash": False}, False),
        (1024, 1024, jnp.bfloat16, {"causal": True}, False),
    ],
)
def test_choice_for_a_tpu(query, keys, dtype, options, kernel):
    q, k = (jax.ShapeDtypeStruct((1, n, 8, 40), dtype) for n in (query, keys))
    program = str(jax.make_jaxpr(lambda q, k: lib.attend(q, k, k, **options))(q, k))
    assert ("pallas_call" in program) == kernel


def test_without_a_gpu_there_is_no_cudnn_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not lib._cudnn_works("bfloat16", 40)


@pytest.mark.parametrize(
    "query, keys, head_dim, dtype, takes",
    [
        (4096, 4096, 40, jnp.bfloat16, True),
        (1024, 1024, 160, jnp.float16, True),
        (4096, 77, 40, jnp.bfloat16, False),  # a prompt's tokens: no gradient at odd lengths
        (1025, 1024, 40, jnp.bfloat16, False),
        (4096, 4096, 44, jnp.bfloat16, False),
        (4096, 4096, 264, jnp.bfloat16, False),
        (4096, 4096, 40, jnp.float32, False),
    ],
)
def test_what_cudnn_takes(monkeypatch, query, keys, head_dim, dtype, takes):
    monkeypatch.setattr(lib, "_cudnn_works", lambda dtype, head_dim: True)
    q, k = (jax.ShapeDtypeStruct((1, n, 8, head_dim), dtype) for n in (query, keys))
    assert lib._cudnn_takes(q, k) == takes


def test_a_transfer_guard_does_not_pass_for_a_failing_cudnn(monkeypatch):
    lib._cudnn_works.cache_clear()
    mine = jax.local_devices()
    monkeypatch.setattr(lib.jax, "local_devices", lambda backend: mine[:1])
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(lib.jax.nn, "dot_product_attention", lambda *x, implementation: plain(*x))
    with jax.transfer_guard("disallow"):
        jax.eval_shape(lambda: lib._cudnn_works("bfloat16", 40))  # while tracing, as in a step
    assert lib._cudnn_works("bfloat16", 40)
    lib._cudnn_works.cache_clear()


def test_a_failing_cudnn_is_told_once(monkeypatch):
    lib._cudnn_works.cache_clear()
    mine = jax.local_devices()
    monkeypatch.setattr(lib.jax, "local_devices", lambda backend: mine[:1])
    with pytest.warns(UserWarning, match="cuDNN attention does not work here"):
        assert not lib._cudnn_works("bfloat16", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not lib._cudnn_works("bfloat16", 40)
    lib._cudnn_works.cache_clear()


def test_a_network_for_several_devices_has_no_flash():
    config = {
        "sample_size": 32,
        "block_out_channels": [16],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    }
    network = model.abstract(unet.UNet2DConditionModel, config)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), network.params)
    sample, text = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 32, 32, 4), (1, 77, 16)))

    def program(graph):
        return str(jax.make_jaxpr(lambda *x: unet.apply(graph, *x))(params, sample, 1, text))

    for kind in ("pallas_call", "name=_head"):  # the TPU's kernel, the CPU's blocks
        assert kind in program(network.graph)
        assert kind not in program(unet.without_flash(network.graph, network.params))
