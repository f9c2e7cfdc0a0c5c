"""judges/judge.py and judges/__init__.py: the rule that turns probabilities into answers, specs, plug-ins."""

import dataclasses
import hashlib
import importlib.metadata
import subprocess

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from aegis_jax import judges
from aegis_jax.errors import AegisError
from aegis_jax.judges.judge import Judge, digest

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)
CHURCH = "church, church building"


def judge(rows=((0.2, 0.5, 0.3),) * 3, labels=("a", "b", "c"), **more):
    return Judge("fake", labels, lambda images: np.array(rows), "0", **more)


def probabilities(groups):
    return hypothesis.extra.numpy.arrays(
        np.float32, (5, sum(map(len, groups))), elements=st.floats(0, 1, width=32), unique=True
    )


GROUPS = (("a", "b", "c"), ("d", "e"))


@hypothesis.given(probabilities(GROUPS))
def test_one_label_of_each_group_is_shown(p):
    found = judge(labels=tuple("abcde"), groups=GROUPS).shown(p)
    for row, shown in zip(p, found):
        for group, columns in zip(GROUPS, ((0, 1, 2), (3, 4))):
            wanted = max(columns, key=lambda k: row[k])
            assert [k for k in columns if shown[k]] == [wanted], group


TRIPLES = (("a", "b", "c"), ("d", "e", "f"), ("g",))


@hypothesis.given(probabilities(TRIPLES), st.integers(1, 2))
def test_the_first_few_of_a_group(p, top):
    found = judge(labels=tuple("abcdefg"), groups=TRIPLES, top=top).shown(p)
    for columns in (slice(0, 3), slice(3, 6)):
        np.testing.assert_array_equal(found[:, columns].sum(1), top)
        # No label that is shown has less than one that is not.
        assert all(row[shown].min() >= row[~shown].max() for row, shown in zip(p[:, columns], found[:, columns]))


def test_thresholds_hold_each_on_their_own():
    found = judge(thresholds={"a": 0.2, "b": 0.6}).shown(np.array([[0.2, 0.5, 0.9], [0.1, 0.7, 0.9]], np.float32))
    assert found.tolist() == [[True, False, False], [False, True, False]]  # c has none, so it is never shown
    with pytest.raises(AegisError, match="goes by thresholds"):
        judge(thresholds={"a": 0.2}).answers(found)


def test_answers_and_shows_go_by_the_same():
    both = judge(labels=("a", "b", "c"), groups=(("c", "a"), ("b",)))
    assert both.answers(both.probabilities(IMAGES)).tolist() == [["c", "b"]] * 3
    assert both.shows(IMAGES, "c").all() and both.shows(IMAGES, "b").all() and not both.shows(IMAGES, "a").any()
    assert both.group("a") == ("c", "a")


def test_what_a_report_says_of_it():
    assert judge(about={"torch": "2"}).record("A") == {
        "name": "fake", "label": "a", "rule": "the largest of 3", "sha256": "0", "about": {"torch": "2"},
    }  # fmt: skip
    assert judge(top=2).record("a")["rule"] == "among the 2 largest of 3"
    both = judge(thresholds={"a": 0.6})
    assert (both.record("a")["rule"], both.record("b")["rule"]) == ("at least 0.6", "never")


def test_labels_are_found_as_people_write_them():
    known = judge(labels=(CHURCH, "Vincent_van_Gogh", "tench, Tinca tinca"))
    for text, wanted in (("church", CHURCH), ("vincent van gogh", known.labels[1]), ("Tinca Tinca", known.labels[2])):
        assert known.find(text) == wanted
    with pytest.raises(AegisError, match="no label 'gogh'; it has 'Vincent_van_Gogh'$"):
        known.find("gogh")
    with pytest.raises(AegisError, match="no label 'dog'; it has 'church, church building', 'Vinc"):
        known.find("dog")
    with pytest.raises(AegisError, match="'crane' may be 'crane, bird', 'crane, machine': say which"):
        judge(labels=("crane, bird", "crane, machine", "x")).find("crane")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": ("a", "a", "b")}, "must differ"),
        ({"labels": ()}, "at least one"),
        ({"groups": (("a", "b"),)}, "each of its labels once"),
        ({"groups": (("a", "b", "c"), ("a",))}, "each of its labels once"),
        ({"thresholds": {"x": 0.5}}, r"does not have: \['x'\]"),
        ({"top": 0}, "top=0"),
        ({"top": 3}, "top=3 of 3 labels, so that each would count"),
        ({"top": 2, "groups": (("a", "b"), ("c",))}, "top=2 of 2 labels"),
        ({"top": 2, "thresholds": {"a": 0.5}}, "top=2 does not go with thresholds"),
    ],
)
def test_a_judge_that_makes_no_sense_is_refused(change, said):
    with pytest.raises(AegisError, match=said):
        judge(**change)


def test_what_it_is_asked_and_what_it_gives_is_checked():
    for images in (IMAGES[0], IMAGES.astype(np.float32), IMAGES[..., :1]):
        with pytest.raises(AegisError, match="wanted uint8"):
            judge().probabilities(images)
    for rows in (((0.2, 0.5, 0.3),), ((0.2, 0.8),) * 3, ((np.nan, 0, 1),) * 3):
        with pytest.raises(AegisError, match="wanted finite numbers"):
            judge(rows).probabilities(IMAGES)
    assert judge().probabilities(IMAGES[:0]).shape == (0, 3)
    for rows, said in (
        (((-0.1, 0.5, 0.6),) * 3, "from -0.1 to 0.6, wanted probabilities"),
        (((0.1, 70, 0.3),) * 3, "from 0.1 to 70, wanted probabilities"),
        (((0.2, 0.5, 0.3), (0.2, 0.8), (1,)), r"no array of numbers \("),
        ((("0.2", "0.5", "0.3"),) * 3, r"no array of numbers \("),
        (((0.2j, 0.5, 0.3),) * 3, r"no array of numbers \("),
        (Grad(), r"no array of numbers \(Can't call numpy"),
    ):
        with pytest.raises(AegisError, match=f"judge fake gave .*{said}"):
            dataclasses.replace(judge(), compute=lambda images, rows=rows: rows).probabilities(IMAGES)
    rounded = judge(((0, 1 + 1e-6, -1e-6),) * 3).probabilities(IMAGES)
    assert rounded.dtype == np.float32 and rounded.min() == 0 and rounded.max() == 1


class Grad:
    """A tensor of PyTorch that requires grad."""

    def __array__(self, *args, **more):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


def test_a_digest_is_what_sha256sum_prints(tmp_path):
    files = [tmp_path / name for name in ("b.safetensors", "a.safetensors")]
    for k, file in enumerate(files):
        file.write_bytes(bytes([k]) * 10)
    assert digest(files[:1]) == hashlib.sha256(files[0].read_bytes()).hexdigest()
    printed = subprocess.run(
        ["sha256sum", "a.safetensors", "b.safetensors"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    assert digest(files) == hashlib.sha256(printed).hexdigest()


class Point:
    value = "somewhere:judge"

    def __init__(self, name, made):
        self.name, self.made = name, made

    def load(self):
        if isinstance(self.made, Exception):
            raise self.made
        return lambda what, options: self.made if self.made is not None else _made(what, options)


def _made(what, options):
    if what == "none":
        raise KeyError(what)
    return judge(about={"what": what} | options)


@pytest.fixture
def installed(monkeypatch):
    points = [Point("mine", None), Point("broken", ImportError("no torch")), Point("wrong", "a text")]

    def entry_points(group):
        assert group == "aegis_jax.judges"
        return points

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_kinds_of_other_packages(installed):
    assert judges.load("mine:some/thing:else?a=1&b=").about == {"what": "some/thing:else", "a": "1", "b": ""}
    with pytest.raises(AegisError, match="'broken' of somewhere:judge cannot be loaded: ImportError"):
        judges.load("broken:")
    with pytest.raises(AegisError, match="'mine:none': the package that brings 'mine' raised KeyError"):
        judges.load("mine:none")
    with pytest.raises(AegisError, match="gave no aegis_jax.judges.Judge"):
        judges.load("wrong")
    with pytest.raises(AegisError, match="'other' is unknown; there are: world, .*mine"):
        judges.load("other:x")


@pytest.mark.parametrize("error", [KeyError("x"), OSError("gone"), MemoryError("much"), AegisError("16x16")])
def test_what_a_judge_of_another_package_raises_names_it(monkeypatch, error):
    def broken(images):
        raise error

    point = Point("mine", Judge("mine:x", ("a", "b"), broken, "0", features=broken))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    found = judges.load("mine:x")
    own = isinstance(error, AegisError | MemoryError)  # those the command line tells as they are
    for ask in (found.probabilities, found.features):
        with pytest.raises(type(error) if own else AegisError) as raised:
            ask(IMAGES)
        assert (raised.value is error) == own
        assert own or str(raised.value) == f"judge mine:x raised {error!r}"


def test_an_installed_package_brings_a_kind(tmp_path, monkeypatch):
    """What pip leaves of a package: a module and its entry points."""
    (tmp_path / "its_judges.py").write_text(
        "from aegis_jax.judges import Judge\n"
        "import numpy as np\n"
        "def load(what, options):\n"
        "    return Judge('its:' + what, ('dog', 'cat'), lambda images: np.tile([0.9, 0.1], (len(images), 1)), '0')\n"
    )
    info = tmp_path / "its_judges-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: its-judges\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[aegis_jax.judges]\nits = its_judges:load\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = judges.load("its:dogs")
    assert found.name == "its:dogs" and found.shows(IMAGES, "Dog").all()


def test_options_are_read_strictly(installed):
    for spec in ("mine?a=1&a=2", "mine?a"):
        with pytest.raises(AegisError, match="each name once"):
            judges.load(spec)
    with pytest.raises(AegisError, match="option 'top' is unknown; there are: none"):
        judges.load("world?top=3")
    assert judges.take({"top": "3"}, top=int) == {"top": 3}
    with pytest.raises(AegisError, match="top='x', wanted int"):
        judges.take({"top": "x"}, top=int)
