"""Compiling ahead: the step finds its programs compiled, whatever the settings make it call."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.erasure.aegis.config import EraseConfig, GRPConfig, LatentsConfig, SoftConfig, WordsConfig
from aegis_jax.erasure.aegis.setup import setup
from aegis_jax.erasure.aegis.step import erase_step
from aegis_jax.erasure.programs import compile_ahead, program

PAPER = {"_moved", "fresh", "predicted", "sign_step", "encoded", "_update"}
SETTINGS = {
    "as in the paper": (EraseConfig(latents=LatentsConfig(steps=4)), PAPER),
    "world": (
        EraseConfig(
            batch=2,
            latents=LatentsConfig(steps=4, refresh_every=2, shared=True),
            soft=SoftConfig(life="run", prefixes=2, tokens=4),
            grp=GRPConfig(rule="none"),
            words=WordsConfig(preserve=1.0, context="push"),
            trainable="xattn",
        ),
        PAPER - {"fresh"} | {"pooled", "random_prompts", "whose_turn", "in_context", "next_kappa"},
    ),
    "shown": (
        EraseConfig(batch=2, latents=LatentsConfig(steps=4, shared=True), words=WordsConfig(context="shown")),
        PAPER | {"random_prompts", "whose_turn", "drawn", "chosen", "in_context", "next_kappa_shown"},
    ),
}


@pytest.fixture
def compiled(caplog):
    """compiled() -> names of the programs that XLA has compiled since the last call."""
    jax.clear_caches()  # other tests' programs

    def names():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [m.split("jit(")[1].split(")")[0] for m in messages if m.startswith("Finished XLA compilation of jit(")]

    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        yield names


@pytest.mark.parametrize("config, programs", SETTINGS.values(), ids=SETTINGS)
def test_a_step_finds_its_programs_compiled(pipeline, config, programs, compiled):
    state, frozen = setup(pipeline, "red star", config)
    step = functools.partial(erase_step, frozen=frozen, config=config)
    compiled()
    count = compile_ahead(step, state)
    ahead = compiled()
    assert set(ahead) == programs and len(ahead) == count
    for _ in range(2):
        state, _ = step(state)
        assert not programs & set(compiled())


@pytest.mark.parametrize(
    "config",
    [
        *(config for config, _ in SETTINGS.values()),
        EraseConfig(
            latents=LatentsConfig(steps=4, offset=True, refresh_every=3),
            grp=GRPConfig(rule="total"),
            words=WordsConfig(context="erase"),
        ),
    ],
    ids=[*SETTINGS, "two pools, in context"],
)
def test_a_step_hands_nothing_over_unasked(pipeline, config):
    # With prefixes fewer concepts than prompts have a turn in a batch.
    state, frozen = setup(pipeline, "red star" if config.soft.prefixes > 1 else ["red star", "circle"], config)
    with jax.transfer_guard_host_to_device("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            state.step + 1  # what the guard is for
        for _ in range(2):  # as a program is compiled, and after
            state, metrics = erase_step(state, frozen, config)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(metrics)))


def test_what_a_program_calls_is_a_part_of_it(compiled):
    inner = program(lambda x: jnp.sin(x))
    outer = program(lambda x, *, n: sum(inner(x + i) for i in range(n)), static_argnames="n")
    x = np.ones(3, np.float32)
    assert compile_ahead(lambda x: outer(x, n=2) + outer(x, n=2) + outer(x, n=3) + inner(x), x) == 3
    assert jnp.allclose(outer(x, n=2), jnp.sin(1.0) + jnp.sin(2.0))


@pytest.mark.parametrize(
    "context", [jax.default_matmul_precision("highest"), jax.threefry_partitionable(False)], ids=["precision", "random"]
)
def test_threads_compile_in_the_contexts_of_the_caller(context, compiled):
    product, noise = program(jnp.matmul), program(lambda key: jax.random.normal(key, (3,)))
    x, key = jnp.ones((2, 2)), jax.random.key(0)
    with context:
        assert compile_ahead(lambda x, key: (product(x, x), noise(key)), x, key) == 2
        compiled()
        product(x, x), noise(key)
        assert not compiled()
