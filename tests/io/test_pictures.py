"""Pictures of an attack as diffusers' load_image reads them, and what phones, scanners and browsers add."""

import os
import struct

import numpy as np
import pytest
from PIL import Image

from aegis_jax.errors import AegisError
from aegis_jax.io import pictures as lib
from aegis_jax.io.pictures import read_pictures

SIZE = (12, 8)  # width, height


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_diffusers_reads_it(tmp_path, pixels, orientation):
    load_image = pytest.importorskip("diffusers.utils").load_image
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    shown = load_image(str(tmp_path / "a.png"))
    assert (shown.size == SIZE) == (orientation < 5)
    np.testing.assert_array_equal(read_pictures(tmp_path, shown.size)[0], np.asarray(shown))


def test_an_orientation_counts_whatever_other_tags_hold(tmp_path, pixels):
    width = struct.pack("<HHI4s", 0x0100, 2, 4, b"big")  # ImageWidth, as text
    exif = struct.pack("<2sHIH", b"II", 42, 8, 2) + width + struct.pack("<HHIHHI", 0x0112, 3, 1, 6, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(lib.read_picture(tmp_path / "a.png"), np.rot90(pixels, -1))


def test_a_name_that_is_not_utf8_is_told(tmp_path, pixels):
    Image.fromarray(pixels).save(os.fsencode(tmp_path) + b"/\xff.png", "PNG")
    with pytest.raises(AegisError, match="holds '.udcff.png', a name that is not UTF-8: rename it"):
        lib.picture_files(tmp_path)


def test_sixteen_bit_grey_is_its_eight_bit_copy(tmp_path):
    grey = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_pictures(tmp_path, SIZE)[0], np.repeat((grey >> 8)[..., None], 3, axis=-1))


def test_webp_and_capital_suffixes_in_order_of_names(tmp_path, pixels, monkeypatch):
    Image.fromarray(255 - pixels).save(tmp_path / "b.PNG")
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True)
    (tmp_path / "c.txt").write_text("no picture")
    np.testing.assert_array_equal(read_pictures(tmp_path, SIZE), np.stack([pixels, 255 - pixels]))
    monkeypatch.setattr(lib, "AT_ONCE", 1)
    np.testing.assert_array_equal(list(lib.in_parts(tmp_path, SIZE)), np.stack([pixels, 255 - pixels])[:, None])


def test_none_or_broken_ones_are_named(tmp_path):
    with pytest.raises(AegisError, match=r"holds no \.png, \.jpg, \.jpeg or \.webp pictures"):
        read_pictures(tmp_path, SIZE)
    (tmp_path / "a.webp").write_bytes(b"RIFF")
    with pytest.raises(AegisError, match=r"a\.webp cannot be read as a picture"):
        read_pictures(tmp_path, SIZE)
