"""Draws the world: 32x32 RGB images of one object on a quiet background, antialiased by
supersampling.

Everything is a pure function of a numpy Generator. Labels are (shape, colour, texture) indices;
NONE (-1) draws something that is none of the values (a random blob, an orange or brown object, a
blotchy surface).
"""

import colorsys

import numpy as np

from aegis_jax.world.concepts import COLOURS, COMBINATIONS, NONE, SHAPES, TEXTURES

SIZE = 32
SUPERSAMPLE = 3
# Hue (in turns), saturation, value. Hues lie far apart so that light and dark tones stay tellable.
HSV = (
    (0.0, 0.9, 0.92),
    (0.145, 0.92, 0.97),
    (0.34, 0.8, 0.72),
    (0.5, 0.8, 0.88),
    (0.63, 0.85, 0.9),
    (0.8, 0.7, 0.78),
)
BATCH = 512  # images drawn at once: bounds memory


def labels(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 3) labels; every combination occurs equally often up to rounding, in random order."""
    order = rng.permutation(len(COMBINATIONS))
    return COMBINATIONS[order[rng.permutation(n) % len(order)]]


def render(rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
    """uint8 images (n, 32, 32, 3) of objects with the given labels (n, 3), jittered by `rng`."""
    label = np.asarray(label)
    parts = [_draw(rng, label[i : i + BATCH]) for i in range(0, len(label), BATCH)]
    return np.concatenate(parts) if parts else np.zeros((0, SIZE, SIZE, 3), np.uint8)


def backgrounds(rng: np.random.Generator, n: int) -> np.ndarray:
    """uint8 images (n, 32, 32, 3) with nothing on them."""
    side = SIZE * SUPERSAMPLE
    return _finish(rng, _background(rng, n, _grid(side)), side)


def _grid(side: int):
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side * SIZE)[None]
    return axis[:, None, :], axis[:, :, None]  # x (1, 1, side), y (1, side, 1), in pixels


def _draw(rng, label):
    n, side = len(label), SIZE * SUPERSAMPLE
    x, y = _grid(side)

    def uniform(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    radius, turn = uniform(9.5, 12.0), uniform(-0.35, 0.35)
    reach = np.maximum(SIZE / 2 - radius - 0.5, 0.5)  # keeps the object inside the frame
    dx, dy = x - SIZE / 2 - uniform(-1, 1) * reach, y - SIZE / 2 - uniform(-1, 1) * reach
    u = (np.cos(turn) * dx + np.sin(turn) * dy) / radius
    v = (np.cos(turn) * dy - np.sin(turn) * dx) / radius  # object coordinates: radius 1, v points down
    inside = np.zeros((n, side, side), bool)
    for shape in np.unique(label[:, 0]):
        rows = label[:, 0] == shape
        inside[rows] = _OUTLINES[shape](u[rows], v[rows]) if shape != NONE else _blob(rng, u[rows], v[rows])
    tone = np.zeros((n, side, side), np.float32)  # -1 dark .. 0 the colour itself .. 1 white
    for texture in np.unique(label[:, 2]):
        rows = label[:, 2] == texture
        draw = _TEXTURES[texture] if texture != NONE else _blotches
        tone[rows] = draw(rng, dx[rows], dy[rows])
    colour = _colours(rng, label[:, 1])[:, None, None, :]
    tone = tone[..., None]
    surface = np.where(tone > 0, colour + (0.97 - colour) * tone, colour * (1 + tone))
    image = np.where(inside[..., None], surface, _background(rng, n, (x, y)))
    return _finish(rng, image, side)


def _finish(rng, image, side):
    n = len(image)
    image = image.reshape(n, SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE, 3).mean((2, 4))
    noise = rng.choice([0.0, 0.0, 0.015], (n, 1, 1, 1)).astype(np.float32)
    image = image + noise * rng.standard_normal(image.shape, np.float32)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _colours(rng, index):
    """Object colours (n, 3) in [0, 1]; index NONE gives orange, pink or brown."""
    odd = ((0.07, 0.95, 0.95), (0.92, 0.5, 0.95), (0.06, 0.75, 0.45))  # no greys: they would vanish
    table = np.array([*HSV, *odd])
    rows = np.where(index == NONE, len(HSV) + rng.integers(0, len(odd), len(index)), index)
    hsv = table[rows] + rng.uniform(-1, 1, (len(index), 3)) * (0.015, 0.06, 0.07)
    hsv[:, 0] %= 1.0
    return np.array([colorsys.hsv_to_rgb(*row) for row in np.clip(hsv, 0, 1)], np.float32)


def _background(rng, n, grid):
    """(n, side, side, 3): greys and pale pastels, plain or a gradient between two of them."""
    x, y = grid
    ends = []
    for _ in range(2):
        value = np.where(rng.random(n) < 0.7, rng.uniform(0.52, 0.78, n), rng.uniform(0.12, 0.3, n))
        tint = [colorsys.hsv_to_rgb(h, s, 1) for h, s in zip(rng.random(n), rng.uniform(0, 0.12, n), strict=True)]
        ends.append((value[:, None] * np.array(tint)).astype(np.float32)[:, None, None, :])
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
    ramp = np.clip(0.5 + ((x - SIZE / 2) * np.cos(angle) + (y - SIZE / 2) * np.sin(angle)) / SIZE, 0, 1)
    amount = (rng.random((n, 1, 1)) < 0.5).astype(np.float32)
    return ends[0] + (ends[1] - ends[0]) * (ramp * amount)[..., None]


def _polygon(u, v, corners: int, inner: float):
    """Regular star polygon with a tip upwards; `inner` is the radius of the notches (1 = tips)."""
    step = np.pi / corners
    angle = np.mod(np.arctan2(u, -v) + step, 2 * step) - step  # 0 at a tip
    r, a = np.hypot(u, v), np.abs(angle)
    # The edge runs from (1, 0) to inner * (cos step, sin step); inside = on the origin's side of
    # it.
    ex, ey = inner * np.cos(step) - 1, inner * np.sin(step)
    return ex * (r * np.sin(a)) - ey * (r * np.cos(a) - 1) > 0


def _triangle(u, v):
    return (v < 0.62) & (1.78 * np.abs(u) < (v + 1.05))


def _heart(u, v):
    x, y = u * 1.22, -v * 1.22 + 0.1
    return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 < 0


def _cross(u, v):
    a, b = np.abs(u), np.abs(v)
    return (np.maximum(a, b) < 1) & (np.minimum(a, b) < 0.34)


def _ring(u, v):
    r = np.hypot(u, v)
    return (r < 1) & (r > 0.47)


def _moon(u, v):
    return (np.hypot(u, v) < 1) & (np.hypot(u - 0.55, v) > 0.82)


def _blob(rng, u, v):
    """A random closed outline that is none of the shapes."""
    n = len(u)
    angle, limit = np.arctan2(v, u), np.full((n, 1, 1), 0.72, np.float32)
    for k in (1, 2, 3, 4, 6):
        size, phase = rng.uniform(0.04, 0.16, (n, 1, 1)), rng.uniform(0, 2 * np.pi, (n, 1, 1))
        limit = limit + size * np.cos(k * angle + phase)
    return np.hypot(u, v) < limit


def _along(rng, dx, dy):
    n = len(dx)
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
    return np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx


def _plain(rng, dx, dy):
    return np.zeros((), np.float32)


def _stripes(rng, dx, dy):
    along, _ = _along(rng, dx, dy)
    period, phase = rng.uniform(5.6, 7.0, (len(dx), 1, 1)), rng.uniform(0, 1, (len(dx), 1, 1))
    return np.where(np.mod(along / period + phase, 1) < 0.5, -0.7, 0.0)


def _dots(rng, dx, dy):
    # Radius >= 2 px: smaller dots do not survive an autoencoder with a factor of 4.
    n = len(dx)
    a, b = _along(rng, dx, dy)
    spacing, radius = rng.uniform(6.2, 7.0, (n, 1, 1)), rng.uniform(2.0, 2.3, (n, 1, 1))
    a, b = a / spacing + rng.uniform(0, 1, (n, 1, 1)), b / spacing + rng.uniform(0, 1, (n, 1, 1))
    return np.where(np.hypot(np.mod(a, 1) - 0.5, np.mod(b, 1) - 0.5) * spacing < radius, 0.95, 0.0)


def _gradient(rng, dx, dy):
    along, _ = _along(rng, dx, dy)
    return np.clip(along / 11.0, -1, 1) * 0.75


def _blotches(rng, dx, dy):
    """Random soft patches, light and dark: a surface that is none of the textures."""
    n = len(dx)
    total = 0.0
    for _ in range(4):
        along, _ = _along(rng, dx, dy)
        total = total + np.cos(along * rng.uniform(0.3, 0.9, (n, 1, 1)) + rng.uniform(0, 7, (n, 1, 1)))
    return np.clip(total * 0.45, -0.7, 0.9)


_OUTLINES = (
    lambda u, v: np.hypot(u, v) < 0.92,
    lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.8,
    _triangle,
    lambda u, v: _polygon(u, v, 5, 0.46),
    _heart,
    _cross,
    _ring,
    _moon,
)
_TEXTURES = (_plain, _stripes, _dots, _gradient)
assert len(HSV) == len(COLOURS) and len(_OUTLINES) == len(SHAPES) and len(_TEXTURES) == len(TEXTURES)
