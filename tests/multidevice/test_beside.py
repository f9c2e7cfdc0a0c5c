"""Two chains at once: the same results, in another thread only where that is safe."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aegis_jax.parallel.beside import beside


def whose(x):
    return x + 1, threading.current_thread().name, jax.config.jax_default_matmul_precision


def test_on_one_cpu_another_thread_works():
    x = jnp.arange(3.0)
    with jax.default_matmul_precision("highest"):
        found, name, precision = beside(x, whose, x)()
    np.testing.assert_array_equal(found, [1, 2, 3])
    assert name.startswith("beside") and precision == "highest"


def test_what_is_traced_or_not_jitted_stays_in_its_thread():
    here, names = threading.current_thread().name, []

    def traced(x):
        y, name, _ = beside(x, whose, x)()
        names.append(name)
        return y

    assert jax.make_jaxpr(traced)(jnp.arange(3.0))
    with jax.disable_jit():
        traced(jnp.arange(3.0))
    traced(np.arange(3.0))
    assert names == [here] * 3


def test_an_error_is_raised_where_the_result_is_asked_for():
    def fails(x):
        raise ValueError("broken")

    wait = beside(jnp.zeros(1), fails, 1)
    with pytest.raises(ValueError, match="broken"):
        wait()
