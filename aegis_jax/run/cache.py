"""The persistent compilation cache: a second run of the same program starts in seconds."""

import contextlib
from pathlib import Path

import jax

from aegis_jax.io import user_cache
from aegis_jax.run.claim import first_alone


def enable() -> None:
    """Keeps compiled programs in $AEGIS_CACHE_DIR, or else in the user's cache folder.

    A cache chosen by JAX's own JAX_COMPILATION_CACHE_DIR is left as it is.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    folder = user_cache.folder()
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def compiling():
    """To be entered while programs are compiled that other processes of this host may want too.

    Workers of a batch start together: one compiles, and the others wait and find in the cache what it has compiled.
    """
    folder = jax.config.jax_compilation_cache_dir
    return first_alone(Path(folder)) if folder and Path(folder).is_dir() else contextlib.nullcontext()
