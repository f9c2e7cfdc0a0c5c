"""What `aegis attack` takes for a case: pictures with their prompts, seeds and wordings, and folders that are taken."""

import csv
import dataclasses
import functools
import warnings

import numpy as np
import pytest
from PIL import Image

from aegis_jax import attacks
from aegis_jax.cli import main
from aegis_jax.errors import AegisError
from aegis_jax.run import attack
from tests.run.given import found, indexed


def test_a_case_is_a_picture_with_its_prompt_and_its_noise(folder, monkeypatch, tmp_path, pictures):
    seen = []

    def run(pipeline, concept, given, config, progress):
        seen.append((given.prompts, given.seeds, given.images[:, 0, 0, 0].tolist(), given.made_from))
        return found(pipeline, [prompt for prompt in given.prompts for _ in range(config.restarts)])

    method = "unlearndiffatk"
    monkeypatch.setitem(attacks.METHODS, method, dataclasses.replace(attacks.METHODS[method], run=run))
    how = {"method": method, "images": pictures, "image_steps": 1, "restarts": 2}
    attack.attack(folder, "dog", **how, out=tmp_path / "1")
    indexed(pictures)
    attack.attack(folder, "dog", **how, out=tmp_path / "2", neutral="cat")
    (tmp_path / "p.csv").write_text("prompt,evaluation_seed\na red dog,5\na star,6\nsky,8\n")
    with warnings.catch_warnings():  # a file without settings says nothing of them
        warnings.simplefilter("error")
        attack.attack(folder, "dog", **how, out=tmp_path / "3", prompts=tmp_path / "p.csv")
    assert [case[:2] for case in seen] == [
        (["dog"] * 3, [0, 1, 2]),
        (["a cat 0", "a cat 1", "a cat 2"], [7, 8, 9]),
        (["a red dog", "a star", "sky"], [5, 6, 8]),
    ]
    assert seen[0][2] == [0, 90, 180]
    assert seen[1][3] == ["a dog 0", "a dog 1", "a dog 2"]  # what a control still aims at
    lines = (pictures / "prompts.csv").read_text()
    for cell, whole in ((",8.0,", True), (",8.5,", False)):  # as pandas may write it, and what is no seed
        (pictures / "prompts.csv").write_text(lines.replace(",8,", cell))
        again = functools.partial(attack.attack, folder, "dog", **how, out=tmp_path / f"4{whole}")
        if whole:
            again()
            assert seen[-1][1] == [7, 8, 9]
        else:
            with pytest.raises(AegisError, match=r"prompts.csv.*seed = '8.5', wanted a whole number"):
                again()
    rows = list(csv.DictReader(open(tmp_path / "3" / "prompts.csv")))
    assert [(row["prompt"], row["seed"], row["restart"]) for row in rows[:3]] == [
        ("a red dog", "5", "0"), ("a red dog", "5", "1"), ("a star", "6", "0"),
    ]  # fmt: skip
    assert not any(row["outcome"] for row in rows)  # nobody judged them
    # Prompt and seed are all that `aegis sample` needs for the same picture.
    argv = ["sample", "--model", folder, "--prompts", tmp_path / "3" / "prompts.csv", "--steps", 1]
    assert main([*map(str, argv), "--out", str(tmp_path / "again")]) == 0
    for name, row in zip(sorted((tmp_path / "again").glob("*.png")), rows):
        again, first = (np.asarray(Image.open(path), int) for path in (name, tmp_path / "3" / row["file"]))
        assert np.abs(again - first).max() <= 1


def test_a_prompts_csv_of_something_else_is_not_read_where_the_prompts_are_said(
    capsys, folder, monkeypatch, tmp_path, pictures
):
    seen = []

    def run(pipeline, concept, given, config, progress):
        seen.append((given.prompts, given.seeds))
        return found(pipeline, given.prompts)

    for name in ("unlearndiffatk", "recall"):
        monkeypatch.setitem(attacks.METHODS, name, dataclasses.replace(attacks.METHODS[name], run=run))
    (pictures / "prompts.csv").write_text("case_number,prompt,evaluation_seed\n0,a dog,5\n1,a cat,6\n2,sky,7\n")
    how = {"method": "unlearndiffatk", "image_steps": 1}
    attack.attack(folder, "dog", images=pictures, prompts=pictures / "prompts.csv", out=tmp_path / "1", **how)
    # What an earlier attack has written is pictures and their prompts, too.
    again = {"images": tmp_path / "1", "prompts": tmp_path / "1" / "prompts.csv"}
    attack.attack(folder, "dog", **again, out=tmp_path / "2", **how)
    assert seen == [(["a dog", "a cat", "sky"], [5, 6, 7])] * 2
    told = r"prompts.csv is no index of this version's aegis sample: say the prompts by --prompts FILE, or move it out"
    with pytest.raises(AegisError, match=told):
        attack.attack(folder, "dog", images=pictures, out=tmp_path / "3", **how)
    with pytest.raises(AegisError, match=r"prompts.csv is no index of this version's aegis sample: move it out of"):
        attack.attack(folder, "dog", method="recall", **again, without=pictures, out=tmp_path / "3", image_steps=1)


def test_settings_of_the_pictures_that_an_attack_does_not_take_over_are_told(folder, monkeypatch, tmp_path, pictures):
    def run(pipeline, concept, given, config, progress):
        return found(pipeline, given.prompts)

    monkeypatch.setitem(attacks.METHODS, "p4d-n", dataclasses.replace(attacks.METHODS["p4d-n"], run=run))
    how = {"method": "p4d-n", "images": pictures, "image_steps": 1, "guidance": 2.0}
    (tmp_path / "p.csv").write_text("prompt,evaluation_guidance\na,2\nb,9\nc,\n")
    with pytest.warns(UserWarning, match=r"p.csv: its own guidance is not used, guidance is 2.0 for all prompts"):
        attack.attack(folder, "dog", **how, out=tmp_path / "1", prompts=tmp_path / "p.csv")
    indexed(pictures)
    index = (pictures / "prompts.csv").read_text()
    (pictures / "prompts.csv").write_text(index.replace("7,,,", "7,2.0,30,"))
    with pytest.warns(UserWarning, match=r"prompts.csv: its own steps is not used, steps is 1 for all") as told:
        attack.attack(folder, "dog", **how, out=tmp_path / "2")
    assert len(told) == 1


def test_a_folder_that_appeared_meanwhile_is_left_alone(folder, monkeypatch, tmp_path, pictures):
    """Of two attacks with one --out the second is refused."""
    given = attack.of_folder

    def meanwhile(*args, **kwargs):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "attack.json").write_text("of another")
        return given(*args, **kwargs)

    monkeypatch.setattr(attack, "of_folder", meanwhile)
    with pytest.raises(AegisError, match="1 exists: choose another --out"):
        attack.attack(folder, "dog", method="p4d-n", images=pictures, image_steps=1, out=tmp_path / "1")
    assert (tmp_path / "1" / "attack.json").read_text() == "of another" and len(list((tmp_path / "1").iterdir())) == 1


@pytest.mark.parametrize("seed", ["9" * 5000, "9" * 5000 + ".5"])
def test_a_seed_of_thousands_of_digits_is_refused(folder, tmp_path, pictures, seed):
    (tmp_path / "p.csv").write_text(f"prompt,seed\na,{seed}\nb,1\nc,2\n")
    with pytest.raises(AegisError, match="p.csv, line 2: seed = '9*.?, wanted a whole number"):
        attack.attack(folder, "dog", method="p4d-n", images=pictures, out=tmp_path / "1", prompts=tmp_path / "p.csv")


def test_wordings_are_read_by_rung_and_a_control_names_another_word(folder, monkeypatch, tmp_path, pictures):
    seen = []

    def run(pipeline, concept, given, config, progress):
        seen.append(given.ladder)
        return found(pipeline, [text for _ in given.prompts for rung in given.ladder.values() for text in rung[:1]])

    monkeypatch.setitem(attacks.METHODS, "ladder", dataclasses.replace(attacks.METHODS["ladder"], run=run))
    file = tmp_path / "words.csv"
    file.write_text("rung,prompt\nname,a Dog\nother,a hound\n,\nname,the dog\n,\n")
    how = {"method": "ladder", "images": pictures, "image_steps": 1, "ladder": file}
    attack.attack(folder, "dog", **how, out=tmp_path / "1")
    attack.attack(folder, "dog", **how, out=tmp_path / "2", neutral="cat")
    assert seen == [
        {"name": ["a Dog", "the dog"], "other": ["a hound"]}, {"name": ["a cat", "the cat"]},
    ]  # fmt: skip
    rows = list(csv.DictReader(open(tmp_path / "1" / "prompts.csv")))
    assert [(row["prompt"], row["seed"]) for row in rows[:3]] == [("a Dog", "0"), ("a hound", "0"), ("a Dog", "1")]


def test_wordings_that_cannot_be_read_are_one_line(folder, tmp_path, pictures):
    file = tmp_path / "words.csv"
    for text, said in (
        (f'rung,prompt\nname,"{"a" * 200_000}"\n', "line 2: field larger than"),
        ("rung,prompt\nname,a dog\nname,a dog, a hound\n", "line 3: 3 cells, but 2 columns"),
        ('rung,prompt\nname,"a dog\nother,a hound\n', "line 2: a quote that is opened in this row is never closed"),
        ("rung,prompt\nname\n", "line 2: no prompt"),
        ("rung,prompt,prompt\nname,a dog,a cat\n", "line 1: column 'prompt' is there twice"),
        ("rung\tprompt\nname\ta dog\n", "wanted a .csv in UTF-8 with the columns rung and prompt"),
    ):
        file.write_text(text)
        with pytest.raises(AegisError, match=f"words.csv: {said}"):
            attack.attack(folder, "dog", method="ladder", images=pictures, ladder=file, out=tmp_path / "1")
