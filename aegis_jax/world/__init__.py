"""The embedded world: a small captioned world, its renderer, and a Stable Diffusion trained on it.

`concepts` and `captions` say what there is and how it is called, `renderer` draws it, `judge` and `clip` recognise it,
`quality` measures the weights in `weights/`. What made them is not installed: tools/world of the repository.
"""

import pathlib

WEIGHTS = pathlib.Path(__file__).parent / "weights"  # what load_pipeline("world") reads


def show(png, *, seed: int = 0) -> None:
    """Write a labelled picture of one generation for each of the 192 combinations to the new file
    `png`.
    """
    from aegis_jax.errors import AegisError
    from aegis_jax.io.pipeline import load_pipeline
    from aegis_jax.world import quality

    png = pathlib.Path(png)
    if png.suffix.lower() != ".png":
        raise AegisError(f"{png}: the picture is a PNG; name a file that ends in .png")
    if png.exists():
        raise AegisError(f"{png} exists: name another file (--out)")
    if not png.parent.is_dir():
        raise AegisError(f"{png.parent} is no folder: make it or name another file (--out)")
    picture = quality.grid(load_pipeline("world"), seed=seed)
    with open(png, "xb") as file:
        picture.save(file, "PNG")
