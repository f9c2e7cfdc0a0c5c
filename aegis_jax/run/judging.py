"""What `aegis judge` does between parsing and printing, and how `aegis attack` asks a judge of the user's."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aegis_jax import judges
from aegis_jax.errors import AegisError
from aegis_jax.evaluation.interval import share
from aegis_jax.io.hub import expand
from aegis_jax.io.pictures import AT_ONCE, picture_files, read_picture
from aegis_jax.judges.judge import Judge
from aegis_jax.run.folder import write_text
from aegis_jax.run.prompts import csv_text

_LISTED = 3  # labels of a picture in the table


@dataclasses.dataclass(frozen=True)
class Question:
    """A judge and the one label of it that counts."""

    judge: Judge
    label: str

    def __call__(self, images) -> np.ndarray:
        """uint8 (n, H, W, 3) -> bool (n,): whether each shows the label."""
        return self.judge.shows(images, self.label)

    def probability(self, images) -> np.ndarray:
        """The label's probability in each of uint8 (n, H, W, 3): (n,)."""
        return self.judge.probabilities(images)[:, self.judge.labels.index(self.label)]

    def counted(self, images) -> dict:
        """Of these images those that show it, as count, n, share and interval."""
        return share(int(self(images).sum()), len(images))


def question(spec: str, label: str) -> Question:
    """Raises `AegisError` for an unknown judge, or a label that it does not have."""
    judge = judges.load(spec)
    return Question(judge, judge.find(label))


def in_words(tally: dict) -> str:
    """A `share` in words."""
    if not tally["n"]:
        return "of no picture"
    low, high = tally["interval"]
    return f"{tally['count']} of {tally['n']} ({low:.0%} to {high:.0%} at 95 %)"


def judge_folder(folder, spec: str, labels: list[str], out=None) -> None:
    """`aegis judge`: a table of what each picture shows, and how many show the labels asked for.

    out: a CSV of every label's probability. Raises `AegisError` where it exists, or its folder does not.
    """
    judge, file = judges.load(spec), None if out is None else expand(out)
    asked = [judge.find(label) for label in labels]
    if file is not None and file.exists():
        raise AegisError(f"{file} exists: choose another --out")
    if file is not None and not file.parent.is_dir():
        raise AegisError(f"{file.parent} is no folder: make it or choose another --out")
    files = picture_files(expand(folder))
    p = np.concatenate([judge.probabilities(images) for images in _together(files)])
    shown = judge.shown(p)
    width = max(len(path.name) for path in files) + 2
    for path, row, seen in zip(files, p, shown):
        first = sorted(np.flatnonzero(seen), key=lambda k: -row[k])
        listed = ", ".join(f"{judge.labels[k]} {row[k]:.2f}" for k in first[: max(_LISTED, len(judge.groups))])
        print(f"{path.name:{width}}{listed or '-'}")
    for label in asked:
        hits = shown[:, judge.labels.index(label)]
        print(f"{label!r} is shown in {in_words(share(int(hits.sum()), len(hits)))}")
    if file is not None:
        rows = ([path.name, *(f"{value:.6g}" for value in row)] for path, row in zip(files, p))
        write_text(file, csv_text([["file", *judge.labels], *rows]))
        print(f"wrote {file}")


def _together(files: list[Path]) -> Iterator[np.ndarray]:
    """The pictures in order, those of one size that follow each other stacked."""
    for i in range(0, len(files), AT_ONCE):
        pictures = map(read_picture, files[i : i + AT_ONCE])
        for _, same in itertools.groupby(pictures, key=np.shape):
            yield np.stack(list(same))
