"""Plan files: what they say, and everything that is wrong with them at once."""

import json

import pytest

from aegis_jax.batch import rows
from aegis_jax.errors import AegisError
from aegis_jax.run import config, table
from aegis_jax.run.asked import on_this_device


def fits(run, concepts):
    for concept in concepts:
        if len(concept) > 20:
            raise AegisError(f"concept {concept!r} has too many tokens")


@pytest.fixture
def checked(tmp_path):
    """checked(text, ending, of=run) -> [(concepts, settings, run), ...]."""

    def check(text, ending="csv", of=None):
        path = tmp_path / f"plan.{ending}"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return rows.check(rows.read(path), of or config.load("world"), fits)

    return check


CSV = """\
name , words,steps,grp.rule,seed
Van Gogh, starry night ; Vincent ,,,
"Monet, Claude",,800,,1

梵高,,,none,
"""
LINES = """\
{"name": "Van Gogh", "words": ["starry night", "Vincent"]}
{"name": " Monet, Claude", "steps": 800, "seed": 1}

{"name": "梵高", "grp": {"rule": "none"}, "words": []}
"""


@pytest.mark.parametrize(("text", "ending"), [(CSV, "csv"), ("\ufeff" + CSV, "CSV"), (LINES, "jsonl")])
def test_rows(checked, text, ending):
    found = checked(text, ending)
    assert [concepts for concepts, _, _ in found] == [
        ("Van Gogh", "starry night", "Vincent"),
        ("Monet, Claude",),
        ("梵高",),
    ]
    world = config.values(on_this_device(config.load("world")))
    plain, monet, other = (values for _, values, _ in found)
    assert plain == {key: world[key] for key in plain} and {"steps", "grp.rule", "method"} < plain.keys()
    assert not {"model", "picture.images", "mesh.data", "concepts", "checkpoint.every"} & plain.keys()
    assert monet == plain | {"steps": 800, "seed": 1} and other == plain | {"grp.rule": "none"}
    assert [run.erase.steps for _, _, run in found] == [500, 800, 500]
    assert json.loads(json.dumps(plain)) == plain


def test_rows_of_blank_cells_are_left_out(checked):
    assert [concepts for concepts, _, _ in checked("name,words,steps\n,,\nstar,,\n,,\n")] == [("star",)]


def test_a_method_of_its_own_keeps_the_scale(checked):
    (_, values, run), _ = checked("name,method\nstar,esd\nheart,\n")
    assert run.erase.method == values["method"] == "esd" and run.erase.soft.use == "none" and run.erase.batch == 4


def test_what_the_device_decides_is_decided_in_the_plan(checked):
    """A row's method may have a `compute_dtype` where the run's has none: no two devices may read it in two ways."""
    uce = config.load("world", [("method", "uce")])
    (_, plain, _), (_, values, run) = checked("name,method\nstar,\nheart,paper\n", of=uce)
    assert "compute_dtype" not in plain and values["compute_dtype"] == run.erase.compute_dtype != "auto"


def test_all_bad_rows_are_told_at_once(checked):
    text = """\
name,words,steps,trainable,stpes,mesh.data
star,,,,,
heart,,many,,5,
,fox,,,,
star,,,,,
red,,0,,,
blue,,,everything,,
one,two,,,,,five
a name that is far too long for it,,,,,
"""
    with pytest.raises(AegisError) as refused:
        checked(text)
    said = str(refused.value)
    for part in (
        "plan.csv: line 1: config key 'mesh.data' is not the method's",
        "; line 1: unknown config key 'stpes'; did you mean 'steps'?; line 3: config key 'steps': got 'many' (str)",
        "; line 4: the name is empty; line 5: 'star' with the same settings is on line 2 already; line 6: config: step",
        "; line 7: config: trainable='everything' (want full | ",
        "; line 8: 7 cells, but 6 columns (quote a cell with a comma); line 9: concept 'a name that is far",
    ):
        assert part in said
    assert said.count("line ") == 10 and "\n" not in said


@pytest.mark.parametrize(
    ("text", "ending", "parts"),
    [
        ("name,stpes\nstar,5\n", "csv", ["line 1", "unknown config key 'stpes'", "did you mean 'steps'?"]),
        ("name,picture.images\nstar,5\n", "csv", ["line 1", "'picture.images' is not the method's"]),
        ("name,mesh.data\nstar,2\nred,\n", "csv", ["line 1", "'mesh.data' is not the method's"]),
        ("name,model\nstar,world\n", "csv", ["line 1", "'model' is not the method's"]),
        ("concept\nstar\n", "csv", ["line 1: no column name (its columns: concept)"]),
        ("", "csv", ["no column name (its columns: none)"]),
        ("name\n", "csv", ["has no rows"]),
        ("name,steps,steps\nstar,1,2\n", "csv", ["column 'steps' is there twice"]),
        ("name,steps\nstar,1_000\n", "csv", ["line 2: config key 'steps': got '1_000' (str)"]),
        ("name,learning_rate\nstar,1_5\n", "csv", ["line 2: config key 'learning_rate': got '1_5' (str)"]),
        ("name,\nstar,1\n", "csv", ["a column without a name"]),
        (b"name\nst\xffr\n", "csv", ["is not UTF-8"]),
        (
            'name,words\nred,\n"star,\nheart,\nblue,\n',
            "csv",
            ["line 3: a quote that is opened in this row is"],
        ),
        ('name,words\nstar,"a;b\n', "csv", ["line 2: a quote that"]),
        ('name\n"star\nheart"\n', "csv", ["line 3: 'star\\nheart' has a line's end or another control character"]),
        ('{"name": "st\\u0000ar"}\n', "jsonl", ["line 1: 'st\\x00ar' has a line's end or another control"]),
        ("name,words\nstar,heart;star\n", "csv", ["line 2: 'star' is there twice"]),
        ('{"name": "star", "words": [" star"]}\n', "jsonl", ["line 1: 'star' is there twice"]),
        ('{"name": "  "}\n', "jsonl", ["line 1: the name is empty"]),
        ('{"name": "star", "name": "heart"}\n', "jsonl", ["line 1: no JSON ('name' is there twice)"]),
        ('{"name": "a", "grp": {"mu": 0.1}, "grp.mu": 0.3}\n', "jsonl", ["no JSON ('grp.mu' is there twice)"]),
        (
            '{"name": "star", "steps": 99999999999999}\n',
            "jsonl",
            ["line 1: config key 'steps': wanted less than 2**31"],
        ),
        ("star\n", "txt", ["is no plan: give a .csv or a .jsonl"]),
        ('{"name": "star"}\nstar\n{"words": []}\n[1]\n', "jsonl", ["line 2: no JSON", "line 3: no name", "line 4: no"]),
        ('{"name": "star", "words": "a"}\n', "jsonl", ["line 1: words is 'a', wanted a list of texts"]),
        ('{"name": "star", "steps": "5"}\n', "jsonl", ["line 1: config key 'steps': got '5' (str)"]),
        ('{"name": "star", "steps": 5}\n{"name": "star", "steps": 5}', "jsonl", ["line 2: 'star' with the same"]),
        ('{"name": "star", "grp": {"omga": 1}}\n', "jsonl", ["unknown config key 'grp.omga'"]),
        ('{"name": "star", "stpes": {}}\n', "jsonl", ["unknown config key 'stpes'", "did you mean 'steps'?"]),
        ('{"name": "star", "grp": {"omga": {}}}\n', "jsonl", ["unknown config key 'grp.omga'"]),
        ('{"name": "star", "steps": {}}\n', "jsonl", ["line 1: config key 'steps': got {} (dict), wanted a whole"]),
        ('{"name": "star", "method": {}}\n', "jsonl", ["line 1: unknown method {}"]),
        ('{"name": "star", "grp": {}, "grp": {}}\n', "jsonl", ["no JSON ('grp' is there twice)"]),
    ],
)
def test_what_is_refused(checked, text, ending, parts):
    with pytest.raises(AegisError) as refused:
        checked(text, ending)
    for part in parts:
        assert part in str(refused.value)


def test_no_more_are_listed_than_can_be_read(checked):
    with pytest.raises(AegisError) as refused:
        checked("name,steps\n" + "star,0\n" * 50)
    assert str(refused.value).count("; line ") == table.LISTED - 1 and "and 30 lines more" in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(AegisError, match="does not exist: give a plan"):
        rows.read(tmp_path / "none.csv")


def test_all_rows_for_one_model(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("name,words\nVan Gogh,starry night;Vincent\nMonet,\nVincent,\n")
    assert rows.together(path) == ["Van Gogh", "starry night", "Vincent", "Monet"]
    path.write_text("name,words,steps\nVan Gogh,,\nMonet,,800\n,fox,\n")
    with pytest.raises(AegisError, match=r"line 3: sets steps, but one run .*; line 4: the name is empty"):
        rows.together(path)
