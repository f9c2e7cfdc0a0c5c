"""Compiling ahead: the step finds its programs compiled, whatever the settings make it call."""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest

from aegis_jax.erasure.config import EraseConfig, LatentsConfig, PreserveConfig, PromptConfig
from aegis_jax.erasure.programs import compile_ahead, program
from aegis_jax.erasure.setup import setup
from aegis_jax.erasure.step import erase_step

SETTINGS = {
    "as in the paper": EraseConfig(latents=LatentsConfig(steps=4)),
    "world": EraseConfig(
        batch=2,
        latents=LatentsConfig(steps=4, refresh_every=2, trajectories=2),
        prompt=PromptConfig(prefixes=2, context=True),
        preserve=PreserveConfig(weight=1.0),
        trainable="xattn",
    ),
}


@pytest.fixture
def compiled(caplog):
    """compiled() -> names of the programs that XLA has compiled since the last call."""

    def names():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [m.split("jit(")[1].split(")")[0] for m in messages if m.startswith("Finished XLA compilation of jit(")]

    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        yield names


@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_a_step_compiles_no_program_again(pipeline, config, compiled):
    state, frozen = setup(pipeline, "red star", config)
    step = functools.partial(erase_step, frozen=frozen, config=config)
    compiled()
    count = compile_ahead(step, state)
    ahead = compiled()
    assert {"_erase_update", "sign_step"} <= set(ahead)
    assert len(ahead) <= count  # other tests may have compiled some
    for _ in range(2):
        state, _ = step(state)
        assert not set(ahead) & set(compiled())


def test_what_a_program_calls_is_a_part_of_it(compiled):
    inner = program(lambda x: jnp.sin(x))
    outer = program(lambda x, *, n: sum(inner(x + i) for i in range(n)), static_argnames="n")
    x = jnp.ones(3)
    assert compile_ahead(lambda x: outer(x, n=2) + outer(x, n=2) + outer(x, n=3) + inner(x), x) == 3
    assert jnp.allclose(outer(x, n=2), jnp.sin(1.0) + jnp.sin(2.0))


def test_precision_of_the_caller(compiled):
    """The threads compile in the caller's contexts."""
    product = program(jnp.matmul)
    x = jnp.ones((2, 2))
    with jax.default_matmul_precision("highest"):
        assert compile_ahead(product, x, x) == 1
        compiled()
        product(x, x)
        assert not compiled()
