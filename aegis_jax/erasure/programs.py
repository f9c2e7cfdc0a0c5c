"""The compiled programs of a step, and how to compile them all at once before the first step calls one.

A step calls its programs one after the other, so that they would be compiled one after the other too, each on few
cores. All are known beforehand: the step, run abstractly, says which it calls and with what shapes.
"""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.threads import cores, side_by_side

_found: contextvars.ContextVar[list | None] = contextvars.ContextVar("programs", default=None)


def pytree(*, data: str, meta: str = ""):
    """Registers a dataclass with JAX; its fields by name, those of `meta` static."""
    return functools.partial(jax.tree_util.register_dataclass, data_fields=data.split(), meta_fields=meta.split())


def program(function=None, **options):
    """`jax.jit` for what a step calls as a program of its own; `compile_ahead` knows of it."""
    if function is None:
        return functools.partial(program, **options)
    jitted = jax.jit(function, **options)

    @functools.wraps(function)
    def call(*args, **kwargs):
        found = _found.get()
        if found is None:
            return jitted(*args, **kwargs)
        found.append((jitted, *jax.tree.map(_abstract, (args, kwargs))))
        with _collecting(None):  # what it calls in turn is a part of it
            return jitted(*args, **kwargs)

    return call


def given(x, dtype=jnp.float32):
    """A number or a list of them as an argument of a program: handed to the device explicitly (jax.transfer_guard)."""
    return jax.device_put(np.asarray(x, dtype))


def compile_ahead(function, *args) -> int:
    """Compiles every program that `function(*args)` would call, on all cores; returns how many there are.

    The calls that follow find them compiled, if their arguments have the shapes, types and contexts of now and are
    not bound to a device (`jax.Array.committed`).
    """
    with _collecting([]) as found:
        jax.eval_shape(function, *args)
    distinct = {(call[0], *_key(call[1:])): call for call in found}.values()
    side_by_side(lambda call: call[0].lower(*call[1], **call[2]).compile(), list(distinct), cores())
    return len(distinct)


@contextlib.contextmanager
def _collecting(into: list | None):
    token = _found.set(into)
    try:
        yield into
    finally:
        _found.reset(token)


def _abstract(x):
    """The shape of an array, traced or not; what is none stays."""
    if not isinstance(x, jax.Array | np.ndarray):
        return x
    kind = jax.typeof(x)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


def _key(call) -> tuple:
    leaves, structure = jax.tree.flatten(call)
    return structure, tuple(leaves)
