"""before_after.png: the same prompts and the same noise, before and after the erasure."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aegis_jax.diffusion.sample import latent_shape, plan, sample
from aegis_jax.errors import AegisError
from aegis_jax.world.interface import EmbeddedWorld

TILE = 128  # pixels, a side of one image
LABEL = 190  # pixels, the column of prompts
GAP = 6
ROWS = 12  # at most; a run may have thousands of concepts
KEPT_ROWS = 3  # of these at least, if there are so many
RED, GREEN, INK = (176, 32, 32), (24, 110, 60), (30, 30, 30)
# Everyday prompts for models of which we know nothing but the concept.
NEUTRAL = ("a photo of a dog in a park", "a red car on a street", "mountains at sunset")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the picture: what it is about, one prompt per column, and what should happen."""

    label: str
    prompts: tuple[str, ...]
    is_erased: bool
    concept: str = ""  # that an erased row is of; it may be said in other words


def rows(concepts: tuple[str, ...], images: int, *, world: EmbeddedWorld | None) -> list[Row]:
    """What the picture shows: erased concepts, then concepts that should be kept; the first of each, `ROWS` in all."""
    erased, kept = _all_rows(concepts, images, world)
    kept = list({row.label: row for row in kept if row.label not in concepts}.values())
    n_kept = min(len(kept), max(KEPT_ROWS, ROWS - len(erased)))
    return erased[: ROWS - n_kept] + kept[:n_kept]


def left_out(concepts: tuple[str, ...], shown: list[Row]) -> str:
    """What a caption says of concepts that are not in the picture: " (9 of 1,000 concepts)"; "" if there are none."""
    count = len({row.concept for row in shown if row.is_erased})
    return f" ({count:,} of {len(set(concepts)):,} concepts)" if count < len(set(concepts)) else ""


def _all_rows(concepts, images, world) -> tuple[list[Row], list[Row]]:
    if world is not None:
        gone = _gone(world, concepts)
        parts = [_world_rows(world, concept, images, gone) for concept in concepts[:ROWS]]
        erased = [row for part in parts for row in part if row.is_erased]
        kept = [row for part in parts for row in part if not row.is_erased]
        return erased, kept
    erased = [Row(concept, (concept,) * images, True, concept) for concept in concepts[:ROWS]]
    return erased, [Row(prompt, (prompt,) * images, False) for prompt in NEUTRAL]


def _gone(world: EmbeddedWorld, concepts) -> frozenset[tuple[str, int]]:
    """(attribute, index) of the values that were erased; of "red star" neither was."""
    named = map(world.named, concepts)
    return frozenset((attribute, index) for found in named if len(found) == 1 for _, attribute, index in found)


def _world_rows(world: EmbeddedWorld, concept: str, images: int, gone: frozenset) -> list[Row]:
    """The concept, one of its held-out words, and two other values of its attribute that were not erased."""
    known = world.named(concept)
    if not known:
        return [Row(concept, (concept,) * images, True, concept)]
    word, attribute, index = known[-1]
    values = world.attributes[attribute]
    synonym = concept.replace(word, values[index].held_out[0])
    others = [values[i].name for i in world.beside(attribute, index, gone)]
    return [
        Row(concept, world.shown(concept, images), True, concept),
        Row(synonym, world.shown(synonym, images), True, concept),
        *(Row(other, world.shown(other, images, gone), False) for other in others),
    ]


def check(pipeline, settings) -> None:
    """Raises `AegisError` for a picture that could not be drawn, so that no training precedes the news."""
    try:
        plan(pipeline, settings.steps, settings.guidance)
        latent_shape(pipeline)
    except AegisError as error:
        raise AegisError(f"picture: {error} (picture.images=0 leaves the picture out)") from error


def sampled(pipeline, run) -> np.ndarray:
    """The picture's images of one pipeline, uint8 (n, H, W, 3), from the run's noise; the other need not be there."""
    settings = run.picture
    prompts = [prompt for row in rows(run.concepts, settings.images, world=run.world) for prompt in row.prompts]
    return sample(pipeline, prompts, seed=run.erase.seed, steps=settings.steps, guidance=settings.guidance)


def caption(run) -> str:
    """What the picture leaves out of a run with many concepts (`left_out`)."""
    return left_out(run.concepts, rows(run.concepts, run.picture.images, world=run.world))


def save(before: np.ndarray, after: np.ndarray, path: Path, run) -> None:
    """Writes the grid of what both pipelines have `sampled`."""
    shown = rows(run.concepts, run.picture.images, world=run.world)
    grid(shown, before, after, f"{run.erase.method}{caption(run)}").save(path)


def grid(shown: list[Row], before: np.ndarray, after: np.ndarray, caption: str = "") -> Image.Image:
    """The picture of rows x (before | after); images uint8 (n, H, W, 3) in the rows' order; caption: above the rows."""
    columns = len(shown[0].prompts)
    block = columns * (TILE + GAP)
    size = (LABEL + 2 * block + 4 * GAP, 3 * GAP + 18 + len(shown) * (TILE + GAP))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    big, small = ImageFont.load_default(16), ImageFont.load_default(13)
    draw.text((GAP, GAP), _wrap(caption, small), INK, small)
    lefts = (LABEL, LABEL + block + 3 * GAP)
    for left, title in zip(lefts, ("before", "after"), strict=True):
        draw.text((left, GAP), title, INK, big)
    for r, row in enumerate(shown):
        top = 2 * GAP + 18 + r * (TILE + GAP)
        state, colour = ("to erase", RED) if row.is_erased else ("to keep", GREEN)
        draw.text((GAP, top + TILE // 2 - 26), _wrap(row.label, small), INK, small)
        draw.text((GAP, top + TILE // 2 + 10), state, colour, small)
        for left, images in zip(lefts, (before, after), strict=True):
            for c in range(columns):
                tile = _tile(images[r * columns + c])
                picture.paste(tile, (left + c * (TILE + GAP), top))
    return picture


def _tile(image: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image)
    picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)  # only ever shrinks
    scale = TILE // max(picture.size)
    if scale > 1:  # whole pixels, so that small images stay what they are
        width, height = picture.size
        picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
    tile = Image.new("RGB", (TILE, TILE), "white")
    tile.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    return tile


def _wrap(text: str, font) -> str:
    """`text` in at most two lines that fit the column of labels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= LABEL - 2 * GAP or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:2]) + (" ..." if len(lines) > 2 else "")
