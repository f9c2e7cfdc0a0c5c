"""Drawings as pixels: each once at `SIDE` pixels with its transparency, then as often as wanted on 32x32 canvases.

Background, place, size and mirror image vary; nothing else does: the hand's colours and lines are what a style is.
"""

import colorsys
import io

import numpy as np
from PIL import Image

SIDE = 96  # of a drawing, before it is placed
SIZE = 32  # of a picture
MIRRORED = 0.5
SCALE = (0.80, 0.98)  # of the drawing's longer side in the picture's
SHIFT = 1.5  # pixels, at most, either way


def raster(drawing: str | bytes) -> np.ndarray:
    """SVG text or an image file's bytes -> uint8 (SIDE, SIDE, 4), cut to what is drawn and centred."""
    if isinstance(drawing, str):
        import resvg_py

        drawing = resvg_py.svg_to_bytes(svg_string=drawing, width=2 * SIDE, height=2 * SIDE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(drawing))).convert("RGBA")
    # Hands leave margins of their own: a judge would know them by the size alone.
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def place(rng: np.random.Generator, drawings: np.ndarray) -> np.ndarray:
    """Drawings (n, SIDE, SIDE, 4) each on a background of its own, uint8 (n, 32, 32, 3)."""
    n = len(drawings)
    made = backgrounds(rng, n).astype(np.float32)
    scale, mirrored = rng.uniform(*SCALE, n), rng.random(n) < MIRRORED
    shift = rng.uniform(-SHIFT, SHIFT, (n, 2))
    for i, drawing in enumerate(drawings):
        image = Image.fromarray(drawing[:, ::-1] if mirrored[i] else drawing)
        # The picture as a window on the drawing's plane: one resampling does size and place together.
        reach = SIDE / scale[i]
        middle = SIDE / 2 - shift[i] * reach / SIZE
        corner = np.floor(middle - reach / 2).astype(int)
        side = int(np.ceil(reach)) + 1
        sheet = Image.new("RGBA", (side, side))
        sheet.paste(image, (int(-corner[0]), int(-corner[1])))
        start = middle - reach / 2 - corner
        box = (start[0], start[1], min(side, start[0] + reach), min(side, start[1] + reach))
        pixels = np.asarray(sheet.resize((SIZE, SIZE), Image.Resampling.BOX, box=box), np.float32)
        alpha = pixels[..., 3:] / 255
        made[i] = made[i] * (1 - alpha) + pixels[..., :3] * alpha
    return made.round().astype(np.uint8)


def backgrounds(rng: np.random.Generator, n: int) -> np.ndarray:
    """uint8 (n, 32, 32, 3): a pale tint, plain or fading into another from one side to the other."""
    hue, saturation, value = rng.random((2, n)), rng.uniform(0.0, 0.25, (2, n)), rng.uniform(0.82, 1.0, (2, n))
    ends = np.array([[colorsys.hsv_to_rgb(*x) for x in zip(*end, strict=True)] for end in zip(hue, saturation, value)])
    axis = np.linspace(0, 1, SIZE)
    down = rng.random((n, 1, 1)) < 0.5
    ramp = np.where(down, axis[:, None], axis[None, :]) * (rng.random((n, 1, 1)) < 0.5)
    pixels = ends[0][:, None, None] + (ends[1] - ends[0])[:, None, None] * ramp[..., None]
    return (255 * pixels).round().astype(np.uint8)
