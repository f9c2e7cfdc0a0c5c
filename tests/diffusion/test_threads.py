"""Two chains at once: the same results, in another thread only where that is safe."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.diffusion.threads import beside


def whose(*arrays):
    key = jax.random.key(0)
    return arrays[0] + 1, threading.current_thread().name, jax.config.jax_default_matmul_precision, key.dtype


def test_on_one_cpu_another_thread_works():
    x = jnp.arange(3.0)
    with jax.default_matmul_precision("highest"), jax.default_prng_impl("rbg"):
        found, name, precision, key_type = beside(whose, x)()
        assert (precision, key_type) == whose(x)[2:]
    np.testing.assert_array_equal(found, [1, 2, 3])
    assert name.startswith("beside") and precision == "highest"


def test_no_context_means_the_same_program():
    traced = []

    @jax.jit
    def program(x):
        traced.append(threading.current_thread().name)
        return x @ x.T

    x = jnp.ones((2, 2))
    program(x)
    beside(program, x)()
    assert len(traced) == 1


def test_what_is_traced_or_not_jitted_stays_in_its_thread():
    names, known = [], jnp.arange(3.0)

    def traced(x):
        y, name, *_ = beside(whose, known, x)()  # the first is no tracer
        names.append(name)
        return y

    jax.eval_shape(traced, known)
    with jax.disable_jit():
        traced(known)
    beside(whose, np.arange(3.0))  # nothing of JAX's
    assert names == [threading.current_thread().name] * 2


def test_an_error_in_the_other_thread_is_raised_by_the_wait():
    def fails(x):
        raise ValueError("broken")

    wait = beside(fails, jnp.zeros(1))
    with pytest.raises(ValueError, match="broken"):
        wait()
