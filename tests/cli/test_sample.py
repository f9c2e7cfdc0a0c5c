"""`aegis sample`: pictures by prompts, of a file too, and what it refuses."""

import csv

import numpy as np
from PIL import Image

import aegis_jax
import aegis_jax.run.attack
import aegis_jax.run.console
import aegis_jax.run.erase
from aegis_jax.cli import main
from tests.cli.told import refused


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def test_sample(capsys, folder, tmp_path):
    argv = [
        "sample", "--model", str(folder), "--prompt", "a red star", "--prompt", "", "--images", "2",
        "--steps", "2", "--seed", "5", "--out", str(tmp_path / "s"),
    ]  # fmt: skip
    assert main(argv) == 0
    names = ["000-a-red-star.png", "001-a-red-star.png", "002-empty.png", "003-empty.png"]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [*names, "prompts.csv"]
    pipeline = aegis_jax.load_pipeline(folder)
    prompts = ["a red star", "a red star", "", ""]
    images = aegis_jax.sample(pipeline, prompts, seed=[5, 6, 5, 6], steps=2)
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(picture(tmp_path / "s" / name), image)
    with open(tmp_path / "s" / "prompts.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["prompt"], row["seed"]) for row in rows] == list(zip(names, prompts, "5656", strict=True))
    # A row alone says how to make its image again.
    same = {key: {row[key] for row in rows} for key in rows[0]}
    assert (same["height"], same["width"], same["model"]) == ({"16"}, {"16"}, {str(folder)})
    assert same["revision"] == same["variant"] == {""}
    again = [
        "sample", "--model", rows[1]["model"], "--prompt", rows[1]["prompt"], "--seed", rows[1]["seed"],
        "--steps", rows[1]["steps"], "--guidance", rows[1]["guidance"], "--out", str(tmp_path / "again"),
        "--height", rows[1]["height"], "--width", rows[1]["width"], "--negative-prompt", rows[1]["negative_prompt"],
    ]  # fmt: skip
    assert main(again) == 0
    np.testing.assert_allclose(picture(tmp_path / "again" / names[0]), picture(tmp_path / "s" / names[1]), atol=1)
    capsys.readouterr()
    assert "exists" in refused(capsys, *argv)
    assert main([*argv, "--overwrite"]) == 0


def test_samples_of_a_file_do_not_depend_on_their_place(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(aegis_jax.run.console, "IMAGES_AT_ONCE", 2)
    rows = ["a star,7", "J.M.W. Turner,4288447746", "梵高,7"]
    sample = ("sample", "--model", str(folder), "--steps", "2", "--height", "12", "--batch", "2")
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["prompt,evaluation_seed", *order]), encoding="utf-8")
        assert main([*sample, "--prompts", str(tmp_path / f"{name}.csv"), "--out", str(tmp_path / name)]) == 0
    names = ["000-a-star.png", "001-j-m-w-turner.png", "002-梵高.png"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [*names, "prompts.csv"]
    back = ["002-a-star.png", "001-j-m-w-turner.png", "000-梵高.png"]
    for here, there in zip(names, back, strict=True):
        one, other = picture(tmp_path / "a" / here), picture(tmp_path / "b" / there)
        assert one.shape == (12, 16, 3) and np.abs(one - other).max() <= 1
    assert len({picture(tmp_path / "a" / name).tobytes() for name in names}) == 3
    # The index says how to draw the same once more, here what is missing in a folder that has other images.
    again = [*sample, "--prompts", str(tmp_path / "a" / "prompts.csv"), "--out", str(tmp_path / "b"), "--overwrite"]
    assert main(again) == 0
    with open(tmp_path / "b" / "prompts.csv", encoding="utf-8", newline="") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {*names, *back}


def test_prompts_that_are_too_long_are_told_of_once(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(aegis_jax.run.console, "IMAGES_AT_ONCE", 1)
    long = ["star " * 20, "circle " * 30]
    argv = ["sample", "--model", str(folder), "--steps", "1", "--out", str(tmp_path), "--prompt", "a"]
    assert main([*argv, *(part for text in long for part in ("--prompt", text))]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "cut off" in line]
    assert len(notes) == 1 and notes[0].startswith("aegis: note: 2 prompts are too long; the first has 20 tokens")


def test_sample_writes_over_nothing_that_appeared_meanwhile(capsys, folder, tmp_path, monkeypatch):
    def late(pipeline, prompts, **more):
        (tmp_path / "000-a.png").write_text("another's")
        return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    monkeypatch.setattr(aegis_jax.run.console, "sample_images", late)
    assert main(["sample", "--model", str(folder), "--prompt", "a", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "000-a.png").read_text() == "another's"
