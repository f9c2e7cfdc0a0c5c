"""The renderer: determinism, coverage, and pixels that show what the label says."""

import colorsys

import numpy as np
import pytest

from aegis_jax.world import renderer
from aegis_jax.world.concepts import COLOURS, COMBINATIONS, NONE, SHAPES

HUES = (0, 52, 122, 180, 227, 288)  # degrees; red, yellow, green, cyan, blue, purple


def draw(label, n=24, seed=0):
    return renderer.render(np.random.default_rng(seed), np.tile([label], (n, 1))).astype(float) / 255


def saturation(image):
    return image.max(-1) - image.min(-1)


def test_the_same_seed_draws_the_same_images():
    first, again = (renderer.render(np.random.default_rng(5), COMBINATIONS[::7]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.uint8 and first.shape == (28, 32, 32, 3)
    assert (first != renderer.render(np.random.default_rng(6), COMBINATIONS[::7])).any()


def test_no_images_is_an_empty_array():
    assert renderer.render(np.random.default_rng(0), np.zeros((0, 3), int)).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("n", [192, 384, 500])
def test_labels_cover_all_combinations_equally(n):
    counts = np.unique(renderer.labels(np.random.default_rng(n), n), axis=0, return_counts=True)[1]
    assert len(counts) == 192 and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("colour", range(len(COLOURS)))
def test_the_object_has_its_colour(colour):
    for image in draw([0, colour, 0]):
        pixel = image[saturation(image) > 0.4]
        hue = 360 * colorsys.rgb_to_hsv(*np.median(pixel, 0))[0]
        assert abs((hue - HUES[colour] + 180) % 360 - 180) < 12


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_objects_are_whole_inside_the_frame(shape):
    for image in draw([shape, 0, 0]):
        inside = saturation(image) > 0.4
        edge = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
        assert edge.sum() <= 4  # corners of a turned square may touch
        assert 60 < inside.sum() < 480


def test_only_the_ring_has_a_hole():
    from scipy.ndimage import binary_fill_holes

    for shape in range(len(SHAPES)):
        holes = [binary_fill_holes(m).sum() - m.sum() for m in saturation(draw([shape, 0, 0])) > 0.35]
        if SHAPES[shape].name == "ring":
            assert min(holes) > 20
        else:
            assert max(holes) <= 2


def test_textures_differ_in_their_tones():
    shares = {}
    for texture, name in enumerate(("plain", "striped", "dotted", "gradient")):
        image = draw([0, 0, texture])
        red = (image[..., 0] - image[..., 1:].max(-1) > 0.12) | (image.min(-1) > 0.85)  # object, dots included
        level = image[..., 0]
        shares[name] = {
            "dark": ((level < 0.5) & red).sum() / red.sum(),
            "white": ((image.min(-1) > 0.85) & red).sum() / red.sum(),
        }
    assert shares["plain"]["dark"] < 0.1 and shares["plain"]["white"] < 0.02
    assert shares["striped"]["dark"] > 0.25 and shares["striped"]["white"] < 0.02
    assert shares["dotted"]["white"] > 0.1 and shares["dotted"]["dark"] < 0.1
    assert 0.02 < shares["gradient"]["dark"] < 0.4 and shares["gradient"]["white"] < 0.02


def test_backgrounds_are_never_as_colourful_as_objects():
    assert saturation(renderer.backgrounds(np.random.default_rng(0), 200) / 255.0).max() < 0.3


@pytest.mark.parametrize("label", [(NONE, 0, 0), (0, NONE, 0), (0, 0, NONE)])
def test_none_draws_something_else(label):
    images = draw(label)
    assert images.std((1, 2)).max(-1).min() > 0.03  # there is an object
