"""The embedded worlds by name, and which of them a model was made from."""

import json
import typing

from aegis_jax.io.hub import EMBEDDED

if typing.TYPE_CHECKING:  # a run's settings are read without JAX
    from aegis_jax.io.pipeline import Pipeline
    from aegis_jax.world.interface import EmbeddedWorld

NAMES = tuple(EMBEDDED)


def find(name: str) -> "EmbeddedWorld":
    """The embedded world of that name. KeyError if it is none of `NAMES`."""
    if name == "canvas":
        from aegis_jax.canvas.embedded import canvas

        return canvas()
    from aegis_jax.world.embedded import WORLD

    return {"world": WORLD}[name]


def of(pipeline: "Pipeline") -> "tuple[EmbeddedWorld, Pipeline] | None":
    """The embedded world whose UNet this pipeline's is like, with that world's own pipeline; None if it is none's."""
    from aegis_jax.io.pipeline import load_pipeline

    for name, folder in EMBEDDED.items():
        config = folder / "unet" / "config.json"
        if config.is_file() and json.loads(config.read_text()) == pipeline.unet.config:
            return find(name), load_pipeline(name)
    return None
