"""A user's pictures, as a viewer shows them."""

import pathlib

import numpy as np
from PIL import Image, ImageOps

from aegis_jax.errors import AegisError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_pictures(folder, size: tuple[int, int]) -> np.ndarray:
    """The pictures of a folder, by name, cut and scaled to (width, height): uint8 (m, H, W, 3).

    They are turned as their EXIF orientation says and lose their alpha, as by diffusers' load_image; of 16 bits a
    channel the upper eight are kept. Raises `AegisError` where there are none, or one cannot be read.
    """
    return np.stack([np.asarray(ImageOps.fit(_read(file), size)) for file in picture_files(folder)])


def picture_files(folder) -> list[pathlib.Path]:
    """The pictures of a folder, by name. Raises `AegisError` where there are none."""
    folder = pathlib.Path(folder)
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise AegisError(f"{folder} holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} pictures")
    return files


def read_picture(file: pathlib.Path) -> np.ndarray:
    """One of them in its own size, uint8 (H, W, 3), otherwise as `read_pictures`."""
    return np.asarray(_read(file))


def _read(file: pathlib.Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode == "I" or picture.mode.startswith("I;16"):  # 16-bit grey, which convert() would cut at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, all of them
        raise AegisError(f"{file} cannot be read as a picture: {error}") from error
