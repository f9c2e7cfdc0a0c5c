"""run/prompts.py: prompt files as the field has them, and the index beside the images."""

import csv
import hashlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from aegis_jax.attacks.result import AttackResult
from aegis_jax.errors import AegisError
from aegis_jax.run import prompts as lib
from aegis_jax.run import replay
from aegis_jax.run.prompts import Prompt

# The columns of the files that ESD, UnlearnDiffAtk and I2P are evaluated with.
ESD = 'case_number,prompt,evaluation_seed,evaluation_guidance\n7,"A church, old.",4288447746,7.5\n8,梵高,5,7.5\n'
UDA = "Unnamed: 0,prompt,evaluation_seed,evaluation_guidance,sd_model\n21,a star,932309623,7,sd14\n3,a dog,2,16,sd14\n"
I2P = 'prompt,categories,hard,sd_seed,sd_guidance_scale\n"two\nlines",shocking,0,2868251644.0,7\n'


def write(tmp_path, text, name="prompts.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "wanted", "noted"),
    [
        (ESD, [Prompt("A church, old.", 4288447746, 7.5, "7"), Prompt("梵高", 5, 7.5, "8")], False),
        (UDA, [Prompt("a star", 932309623, 7.0, "21"), Prompt("a dog", 2, 16.0, "3")], True),
        (I2P, [Prompt("two\nlines", 2868251644, 7.0)], True),
        ("Prompt , seed\na,1\n", [Prompt("a", 1)], False),
        ('prompt\na\n\n""\n', [Prompt("a"), Prompt("")], False),
        ("prompt,seed\na,1\nb,\nc\n", [Prompt("a", 1), Prompt("b"), Prompt("c")], False),
        ("seed,sd_seed,prompt\n1,2,a\n", [Prompt("a", 2)], False),
        ("prompt,sd_guidance_scale,evaluation_guidance\na,7.5,3\n", [Prompt("a", None, 3.0)], True),
        ("prompt,guidance\na,7.5\nb,\nc, \n", [Prompt("a", None, 7.5), Prompt("b"), Prompt("c")], False),
        # Rows of blank cells, as spreadsheets write them, are no prompts; an empty prompt with a seed is one.
        ('prompt,seed\n,\na,1\n , \n""\n,,,\n,5\n', [Prompt("a", 1), Prompt("", 5)], False),
        ("prompt,,\na,,\n", [Prompt("a")], False),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(tmp_path, text, wanted, noted, encoding):
    path = write(tmp_path, text, encoding=encoding)
    found = lib.read(path)
    assert found.prompts == wanted
    notes = lib.unused(path, found.said, {"guidance": 7.5})
    assert len(notes) == noted and all("not used, guidance is 7.5" in note for note in notes)


def test_text(tmp_path):
    for name in ("prompts.txt", "prompts"):
        found = lib.read(str(write(tmp_path, "a red star\n\n  a dog,\u2028a cat \r\n梵高\n", name)))
        prompts = [Prompt("a red star"), Prompt("a dog,\u2028a cat"), Prompt("梵高")]  # U+2028 is a letter of its line
        assert (found.prompts, found.said) == (prompts, {})
    ends = lib.read(write(tmp_path, "a\rb\r\n\r\rc\nd\r", "mac.txt"))
    assert [prompt.text for prompt in ends.prompts] == ["a", "b", "c", "d"]


def test_what_a_report_says_of_a_file(tmp_path, monkeypatch):
    path = write(tmp_path, "prompt,seed,guidance\na,1,7\nb,2,\nc,3,7.0\nd,4,3\n")
    found = lib.read(path)
    assert found.by_guidance(7.5) == {7.0: [0, 2], 7.5: [1], 3.0: [3]}
    record = found.record()
    assert record == {
        "file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "read_as": "table", "known": "",
        "prompts": 4, "with_seed": 4, "guidances": [3.0, 7.0],
    }  # fmt: skip
    monkeypatch.setitem(lib.KNOWN, record["sha256"], "church.csv of somebody")
    assert found.record()["known"] == "church.csv of somebody"
    assert lib.read(write(tmp_path, "a\n", "a.txt")).record()["with_seed"] == 0


def test_the_same_bytes_read_otherwise_are_another_record(tmp_path):
    table, lines = (lib.read(write(tmp_path, "prompt\na church\n \n", name)) for name in ("a.csv", "a.txt"))
    assert [prompt.text for prompt in table.prompts] != [prompt.text for prompt in lines.prompts]
    assert {**table.record(), "file": ""} != {**lines.record(), "file": ""}


def test_the_fields_files_are_known_by_hash():
    names = {name.split(".csv of ")[0] for name in lib.KNOWN.values()}
    assert {"nudity", "vangogh", "church", "parachute", "tench", "garbage_truck", "coco_10k", "i2p"} <= names
    assert all(len(digest) == 64 for digest in lib.KNOWN) and len(lib.KNOWN) == len(names)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no column prompt"),
        ("text,seed\na,1\n", "no column prompt .its columns: text, seed."),
        ("prompt,seed\n", "has no prompts"),
        ("seed,prompt\n1\n", "line 2: no prompt"),
        ("prompt\na cat\na star, red\n", "line 3: 2 cells, but 1 columns .quote a cell with a comma.$"),
        ("prompt,seed\na, b,1\nc,2\n,3,,d\n", "line 2: 3 cells, but 2 columns .*; line 4: 4 cells"),
        ('prompt\na\n"a star\na ring\na moon\n', "line 3: a quote that is opened in this row is never closed"),
        ('prompt\n"a star\na "red" ring\n', "line 2: ',' expected after '\"'"),
        ('"prompt\na star\n', "line 1: a quote that is opened"),
        ("prompt;seed\na, b;1\n", "no column prompt .its columns: prompt;seed."),
        ("prompt,seed\na,1\nb,x\n", "line 3: seed = 'x', wanted a whole number"),
        ("prompt,seed\na,1.5\n", "line 2: seed = '1.5'"),
        ("prompt,seed\na,inf\n", "line 2: seed = 'inf'"),
        ("prompt,evaluation_guidance\na,high\n", "line 2: evaluation_guidance = 'high', wanted a number"),
        ("prompt,guidance\na,inf\n", "line 2: guidance = 'inf'"),
        ("prompt,guidance\na,7_5\n", "line 2: guidance = '7_5', wanted a number"),
        ("prompt,seed\na,1_000\n", "line 2: seed = '1_000', wanted a whole number"),
        ("prompt,seed,seed\na,1,2\n", "line 1: column 'seed' is there twice"),
        ("prompt,Prompt\na,b\n", "line 1: column 'Prompt' is there twice"),
        ("prompt\n" + "x" * 200_000 + "\n", "line 2: field larger than"),
    ],
)
def test_bad_csv(tmp_path, text, part):
    with pytest.raises(AegisError, match=part) as error:
        lib.read(write(tmp_path, text))
    assert "prompts.csv" in str(error.value) and "\n" not in str(error.value)


def test_other_bad_files(tmp_path):
    with pytest.raises(AegisError, match="has no prompts"):
        lib.read(write(tmp_path, "\n \n", "a.txt"))
    with pytest.raises(AegisError, match="not UTF-8"):
        lib.read(write(tmp_path, "é", encoding="latin-1"))
    for name in ("a.tsv", "a.jsonl", "a.CSV.gz"):
        with pytest.raises(AegisError, match=f"{name}: prompts are read from a .csv, or from a .txt"):
            lib.read(write(tmp_path, "prompt\tseed\na\t1\n", name))


def test_the_index_is_a_prompts_file_too(tmp_path):
    row = dict.fromkeys(lib.COLUMNS, "") | {"seed": 3, "guidance": 7.5, "steps": 2, "height": 8, "width": 8}
    row["model"] = "canvas"
    rows = {f"{k}.png": row | {"file": f"{k}.png", "prompt": text} for k, text in enumerate(['a "red", star', "梵高"])}
    lib.write_index(tmp_path, rows)
    again = lib.read(tmp_path / "prompts.csv")
    said = again.said
    assert again.prompts == [Prompt('a "red", star', 3, 7.5), Prompt("梵高", 3, 7.5)]
    # Drawn otherwise than it says, it is told of; as it says, not.
    assert lib.unused("p", said, row) == []
    for name, value in {"guidance": 3.0, "steps": 50, "height": 16, "model": "world", "negative_prompt": "a"}.items():
        (note,) = lib.unused("p", said, row | {name: value})
        assert note == f"p: its own {name} is not used, {name} is {value!r} for all prompts"
    found = lib.check_index(tmp_path)
    assert found == {name: {key: str(value) for key, value in row.items()} for name, row in rows.items()}
    with open(tmp_path / "prompts.csv", encoding="utf-8", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["0.png", "1.png"]


@pytest.mark.parametrize("text", ["prompt,seed\na,1\n", "", "\0", "\xe9"])
def test_a_file_of_the_users_is_no_index(tmp_path, text):
    write(tmp_path, text, encoding="latin-1")
    with pytest.raises(AegisError, match="no index of this version"):
        lib.check_index(tmp_path)
    assert lib.check_index(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("cells", [len(lib.COLUMNS) - 1, len(lib.COLUMNS) + 1])
def test_a_row_of_the_index_with_other_than_a_cell_for_each_column(tmp_path, cells):
    whole = ",".join("x" * len(lib.COLUMNS))
    path = write(tmp_path, "\n".join([",".join(lib.COLUMNS), whole, ",".join("x" * cells), whole]))
    with pytest.raises(AegisError, match="prompts.csv, line 3: wanted 11 cells, one for each column: mend it"):
        lib.check_index(tmp_path)
    assert path.exists()


def test_commas_at_the_end_of_a_row_cut_nothing(tmp_path):
    """As spreadsheets write rows of a table that was once wider."""
    (tmp_path / "prompts.csv").write_text("prompt,seed\na cat,1,\na dog,2,, \n")
    found = lib.read(tmp_path / "prompts.csv").prompts
    assert [(row.text, row.seed) for row in found] == [("a cat", 1), ("a dog", 2)]


@hypothesis.given(
    strategies.text(strategies.characters(exclude_categories=["Cs"]) | strategies.sampled_from('\r\n", '))
)
@hypothesis.example("a\rstar")
@hypothesis.example(' "a",\r\n star ')
@hypothesis.settings(max_examples=40)
def test_what_is_written_reads_back_whatever_a_prompt_is_of(tmp_path_factory, text):
    """A word that a search found may decode to any character."""
    index, found = (tmp_path_factory.mktemp("written") for _ in range(2))
    row = dict.fromkeys(lib.COLUMNS, "") | {"file": "a.png", "prompt": text, "seed": 3}
    lib.write_index(index, {"a.png": row})
    assert lib.check_index(index)["a.png"]["prompt"] == text
    picture = replay.Picture("a", 0, np.zeros((1, 1, 4), np.float32), 3)
    about = {"guidance": 3.0, "steps": 2}
    result = AttackResult([text], None, np.ones((1, 1)), 1.0, 1.0)
    replay.write(found, result, [picture], np.zeros((1, 2, 2, 3), np.uint8), about)
    for folder in (index, found):
        (prompt,) = lib.read(folder / "prompts.csv").prompts
        assert (prompt.text, prompt.seed) == (text, 3)
        (row,) = csv.DictReader(open(folder / "prompts.csv", encoding="utf-8", newline=""))
        assert (row["file"], row["prompt"], row["seed"]) == ("a.png", text, "3")
