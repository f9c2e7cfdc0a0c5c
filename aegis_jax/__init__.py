"""aegis_jax: robust concept erasure for Stable Diffusion in JAX/Flax.

The names below are the public API. They are imported when first used, so that `import aegis_jax`
and `aegis --help` cost no JAX start-up.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "AegisError": "aegis_jax.errors",
    "load_pipeline": "aegis_jax.io.pipeline",
    "save_pipeline": "aegis_jax.io.export",
    "write_delta": "aegis_jax.io.delta_write",
    "apply_delta": "aegis_jax.io.delta_apply",
    "encode_text": "aegis_jax.diffusion.sample",
    "predict_noise": "aegis_jax.diffusion.sample",
    "decode": "aegis_jax.diffusion.sample",
    "sample": "aegis_jax.diffusion.sample",
    "erase": "aegis_jax.run.erase",
    "erase_each": "aegis_jax.run.lanes",
    "attack": "aegis_jax.attacks",
    "evaluate": "aegis_jax.report.evaluate",
    "EraseConfig": "aegis_jax.erasure.aegis.config",
}
_SUBPACKAGES = set(
    "attacks batch canvas diffusion erasure evaluation io judges models parallel plan report run world".split()
)

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name):
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value  # the next access skips this function
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"aegis_jax.{name}")
    raise AttributeError(f"module 'aegis_jax' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME, *_SUBPACKAGES})
