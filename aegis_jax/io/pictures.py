"""A user's pictures, as a viewer shows them."""

import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from aegis_jax.errors import AegisError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
AT_ONCE = 64  # pictures in memory, where a folder is looked at part by part
# What undoes each EXIF orientation. ImageOps.exif_transpose writes the EXIF anew, and fails where another tag is odd.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def read_pictures(folder, size: tuple[int, int]) -> np.ndarray:
    """The pictures of a folder, by name, cut and scaled to (width, height): uint8 (m, H, W, 3).

    They are turned as their EXIF orientation says and lose their alpha, as by diffusers' load_image; of 16 bits a
    channel the upper eight are kept. Raises `AegisError` where there are none, or one cannot be read.
    """
    return _fitted(picture_files(folder), size)


def in_parts(folder, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The same, `AT_ONCE` at a time."""
    files = picture_files(folder)
    for i in range(0, len(files), AT_ONCE):
        yield _fitted(files[i : i + AT_ONCE], size)


def _fitted(files: list[pathlib.Path], size: tuple[int, int]) -> np.ndarray:
    images = np.empty((len(files), size[1], size[0], 3), np.uint8)
    for image, file in zip(images, files):
        image[:] = ImageOps.fit(_read(file), size)
    return images


def picture_files(folder) -> list[pathlib.Path]:
    """The pictures of a folder, by name. Raises `AegisError` where there are none, and for a name that is not UTF-8."""
    folder = pathlib.Path(folder)
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise AegisError(f"{folder} holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} pictures")
    for file in files:
        try:
            file.name.encode()
        except UnicodeEncodeError:  # no report, index or digest could hold it
            raise AegisError(f"{folder} holds {file.name!r}, a name that is not UTF-8: rename it") from None
    return files


def read_picture(file: pathlib.Path) -> np.ndarray:
    """One of them in its own size, uint8 (H, W, 3), otherwise as `read_pictures`."""
    return np.asarray(_read(file))


def _read(file: pathlib.Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            turn = _UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation))
            if turn is not None:
                picture = picture.transpose(turn)
            if picture.mode == "I" or picture.mode.startswith("I;16"):  # 16-bit grey, which convert() would cut at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, all of them
        raise AegisError(f"{file} cannot be read as a picture: {error}") from error
