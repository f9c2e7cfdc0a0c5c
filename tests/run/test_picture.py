"""run/picture.py: which prompts are shown, and that the grid shows them where it says."""

import numpy as np
import pytest
from PIL import Image

import aegis_jax
from aegis_jax.run import picture
from aegis_jax.run.config import PictureConfig, RunConfig
from aegis_jax.world import concepts as world
from aegis_jax.world.embedded import WORLD


def words(row):
    return {word for prompt in row.prompts for word in prompt.split()}


@pytest.mark.parametrize("concept", ["star", "red", "striped", "pentagram"])
def test_rows_of_a_world_concept(concept):
    rows = picture.rows((concept,), 3, world=WORLD)
    attribute, index = world.find(concept)
    value = world.ATTRIBUTES[attribute][index]
    erased = [row for row in rows if row.is_erased]
    kept = [row for row in rows if not row.is_erased]
    assert concept in words(erased[0])
    assert words(erased[1]) & set(value.held_out) and not words(erased[1]) & set(value.seen)
    assert len(kept) == 2
    for row in kept:
        assert not words(row) & set(value.words)
        assert world.find(row.label)[0] == attribute
    for row in rows:
        assert len(set(row.prompts)) == 3  # the columns differ in what the concept leaves open
        for prompt in row.prompts:
            said = [a for _, a, _ in world.named(prompt)]
            assert sorted(said) == ["colour", "shape", "texture"]


def test_a_phrase_keeps_its_other_words():
    rows = picture.rows(("red heart",), 2, world=WORLD)
    assert all({"red", "heart"} <= set(prompt.split()) for prompt in rows[0].prompts)
    assert rows[1].label == "red cardioid"


def test_what_is_erased_is_not_shown_as_kept():
    rows = picture.rows(("star", "heart"), 2, world=WORLD)
    assert "heart" not in {row.label for row in rows if not row.is_erased}
    assert len({row.label for row in rows}) == len(rows)


def test_what_is_to_be_kept_is_not_asked_for_with_words_that_were_erased():
    rows = picture.rows(("red", "green", "star", "striped", "moon"), 4, world=WORLD)
    kept = [row for row in rows if not row.is_erased]
    assert len(kept) >= picture.KEPT_ROWS
    said = {word for row in kept for prompt in row.prompts for word in prompt.split()}
    assert not said & {"red", "green", "star", "striped", "moon"}
    # "red star" erases neither everything red nor every star.
    assert any("red" in prompt for row in picture.rows(("red star",), 6, world=WORLD) for prompt in row.prompts)
    everything = tuple(value.name for values in world.ATTRIBUTES.values() for value in values)
    assert picture.rows(everything, 2, world=WORLD)


def test_rows_of_an_unknown_model():
    rows = picture.rows(("Van Gogh",), 2, world=None)
    assert rows[0] == picture.Row("Van Gogh", ("Van Gogh",) * 2, True, "Van Gogh")
    assert len(rows) > 2 and not any(row.is_erased for row in rows[1:])


@pytest.mark.parametrize(
    ("concepts", "is_world", "shown"),
    [
        ([f"painter {k}" for k in range(1000)], False, 9),
        ([f"painter {k}" for k in range(9)], False, 9),
        ([v.name for values in world.ATTRIBUTES.values() for v in values], True, 6),
    ],
)
def test_a_picture_has_at_most_twelve_rows(concepts, is_world, shown):
    rows = picture.rows(tuple(concepts), 3, world=WORLD if is_world else None)
    assert len(rows) <= 12
    assert len({row.concept for row in rows if row.is_erased}) == shown
    assert is_world or sum(not row.is_erased for row in rows) == 3  # some of what is kept is shown in any case
    caption = picture.left_out(tuple(concepts), rows)
    assert caption == ("" if shown == len(concepts) else f" ({shown} of {len(concepts):,} concepts)")


def test_the_caption_is_in_the_picture():
    rows = [picture.Row("a", ("x",), True, "a")]
    images = np.zeros((1, 8, 8, 3), np.uint8)
    plain, told = (np.asarray(picture.grid(rows, images, images, text)) for text in ("", " (1 of 9 concepts)"))
    assert (plain != told).any() and (plain[24:] == told[24:]).all()  # above the rows


@pytest.mark.parametrize("size", [8, 32, 300])
def test_grid(size):
    """Each tile has its own grey level: every image is where its row, side and column say."""
    rows = [picture.Row("a", ("x", "y"), True), picture.Row("b" * 99, ("z", "w"), False)]
    levels = {side: 20 * np.arange(1, 5) + 90 * side for side in (0, 1)}
    images = [np.ones((4, size, size, 3), np.uint8) * levels[s][:, None, None, None] for s in (0, 1)]
    grid = np.asarray(picture.grid(rows, *(i.astype(np.uint8) for i in images)))
    step = picture.TILE + picture.GAP
    for side in (0, 1):
        left = picture.LABEL + side * (2 * step + 3 * picture.GAP)
        for k in range(4):
            y = 2 * picture.GAP + 18 + (k // 2) * step + picture.TILE // 2
            x = left + (k % 2) * step + picture.TILE // 2
            assert (grid[y, x] == levels[side][k]).all()


def test_both_sides_start_from_the_same_noise(folder, tmp_path):
    pipeline = aegis_jax.load_pipeline(folder)
    run = RunConfig(concepts=("star",), picture=PictureConfig(images=1, steps=1))
    picture.save(picture.sampled(pipeline, run), picture.sampled(pipeline, run), tmp_path / "p.png", run)
    grid = np.asarray(Image.open(tmp_path / "p.png"))
    shift = picture.TILE + 4 * picture.GAP
    body = grid[18 + 2 * picture.GAP :]
    before = body[:, picture.LABEL : picture.LABEL + picture.TILE]
    after = body[:, picture.LABEL + shift : picture.LABEL + shift + picture.TILE]
    np.testing.assert_array_equal(before, after)
