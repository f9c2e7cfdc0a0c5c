"""`aegis judge`: the table, the counts, the CSV."""

import csv

import numpy as np
import pytest
from PIL import Image

from aegis_jax import judges
from aegis_jax.cli import main
from aegis_jax.judges.judge import Judge


@pytest.fixture
def pictures(tmp_path):
    """Three of two sizes."""
    for name, red, size in (("a.png", 255, (8, 8)), ("b.png", 128, (6, 4)), ("c.png", 0, (6, 4))):
        Image.new("RGB", size, (red, 0, 0)).save(tmp_path / name)
    return tmp_path


def judge(**more):
    def compute(images):
        red = images[..., 0].mean((1, 2)) / 255
        return np.stack([red, 1 - red], 1)

    return Judge("red:", ("red, crimson", "dark"), compute, "abc", **more)


def run(capsys, monkeypatch, found, *argv):
    monkeypatch.setattr(judges, "load", lambda spec: {"red:": found}[spec])
    code = main(["judge", *map(str, argv), "--judge", "red:"])
    return code, *capsys.readouterr()


def test_a_row_a_picture_and_a_line_a_label(capsys, monkeypatch, pictures):
    code, out, _ = run(
        capsys, monkeypatch, judge(), pictures, "--label", "Crimson", "--label", "dark", "--out", pictures / "p.csv"
    )
    assert code == 0
    assert out.splitlines() == [
        "a.png  red, crimson 1.00",
        "b.png  red, crimson 0.50",
        "c.png  dark 1.00",
        "'red, crimson' is shown in 2 of 3 (21% to 94% at 95 %)",
        "'dark' is shown in 1 of 3 (6% to 79% at 95 %)",
        f"wrote {pictures / 'p.csv'}",
    ]
    rows = list(csv.DictReader(open(pictures / "p.csv")))
    assert [row["file"] for row in rows] == ["a.png", "b.png", "c.png"]
    assert [float(row["dark"]) for row in rows] == pytest.approx([0, 127 / 255, 1], abs=1e-6)
    code, _, err = run(capsys, monkeypatch, judge(), pictures, "--out", pictures / "p.csv")
    assert code == 2 and "p.csv exists: choose another --out" in err


def test_below_all_thresholds_there_is_nothing_to_list(capsys, monkeypatch, pictures):
    code, out, _ = run(capsys, monkeypatch, judge(thresholds={"red, crimson": 0.9}), pictures)
    assert code == 0 and out.splitlines() == ["a.png  red, crimson 1.00", "b.png  -", "c.png  -"]


def test_bad_input(capsys, monkeypatch, pictures, tmp_path):
    for argv, said in (
        ((pictures, "--label", "blue"), "no label 'blue'"),
        ((pictures / "none",), "holds no .png"),
        ((pictures, "--out", pictures / "none" / "p.csv"), f"{pictures / 'none'} is no folder: make it or choose"),
    ):
        code, out, err = run(capsys, monkeypatch, judge(), *argv)
        assert code == 2 and not out and said in err and len(err.splitlines()) == 1
