"""The embedded world: a small captioned world, its renderer, and a Stable Diffusion trained on it.

`concepts` and `captions` say what there is and how it is called, `renderer` draws it, `judge` and
`clip` recognise it, `training` makes the weights in `weights/`, `quality` measures them.
"""

import pathlib

WEIGHTS = pathlib.Path(__file__).parent / "weights"  # what load_pipeline("world") reads


def train(out, *, seed: int = 0, log=None) -> pathlib.Path:
    """Train the world in folder `out` (three to four hours on two cores; goes on where an earlier run
    stopped).

    Returns the exported diffusers folder, `out/world`. log: receives the progress lines; default,
    print.
    """
    from aegis_jax.world import training

    return training.train(out, seed=seed, **({} if log is None else {"log": log}))


def show(png, *, seed: int = 0) -> None:
    """Write a labelled picture of one generation for each of the 192 combinations to the file
    `png`.
    """
    from aegis_jax.errors import AegisError
    from aegis_jax.io.pipeline import load_pipeline
    from aegis_jax.world import quality

    if pathlib.Path(png).suffix.lower() != ".png":
        raise AegisError(f"{png}: the picture is a PNG; name a file that ends in .png")
    quality.grid(load_pipeline("world"), pathlib.Path(png), seed=seed)
