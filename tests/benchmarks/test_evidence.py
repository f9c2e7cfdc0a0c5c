"""benchmarks/evidence.py: which cells there are, how lines become a table, and the smallest real run of it."""

import pathlib
import re

import pytest

from aegis_jax.evaluation.interval import wilson
from benchmarks import cells, evidence, evidence_table
from benchmarks.evidence import BASE, FULL, METHODS, ORACLE, QUICK, Sizes

SIZES = Sizes(**FULL)
START, END = "<!-- evidence -->", "<!-- end evidence -->"
ALL = (evidence.CONCEPTS, evidence.SEEDS, METHODS)


def line(cell, plain=(1, 10), value=2.0, **attacks):
    shares = {name: {"count": 5, "n": 10} for name in evidence_table.SHARES}
    shares["plain"] = {"count": plain[0], "n": plain[1]}
    figures = {"shares": shares, "values": dict.fromkeys(evidence_table.VALUES, value), "attacks": attacks}
    figures["seconds"] = 1800
    about = {"date": "2026-11-29", "cores": 2, "cpu": "a CPU", "versions": {"jax": "1"}, "revision": "abc"}
    return {"cell": cell, "figures": figures, "seconds": 1, "about": about}


def test_a_method_that_is_not_there_yet_has_no_cells():
    found = evidence.grid(*ALL, SIZES, {})
    methods = {cell["method"] for cell in found}
    assert {"esd", "uce", "speed", "paper", "released", "aegis+", BASE} <= methods and ORACLE not in methods
    assert evidence.grid(["star"], [0], ["no such preset"], SIZES, {}) == []
    assert len({cells.key(cell) for cell in found}) == len(found) == 9 * len(methods)


def test_a_cell_is_another_with_other_sizes_settings_or_weights(tmp_path):
    def key(method="esd", sizes=SIZES, oracles=None):
        (cell,) = evidence.grid(["star"], [0], [method], sizes, oracles or {})
        return cells.key(cell)

    assert key() == key()
    settings = QUICK["settings"]
    others = [
        Sizes(8, 70),
        Sizes(100, 8),
        Sizes(100, 70, "cce"),
        Sizes(100, 70, steps=20),
        Sizes(100, 70, "all", settings),
    ]
    assert len({key(), *(key(sizes=sizes) for sizes in others)}) == 6
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.safetensors").write_text(name)
    oracles = [key(ORACLE, oracles={"star": str(tmp_path / name)}) for name in "ab"]
    assert oracles[0] != oracles[1]


def test_quick_settings_are_settings_that_the_attacks_have():
    assert len(evidence.conditions(Sizes(**QUICK))) == 12
    for method in METHODS[2:]:
        if evidence.known(method, {}):
            given = dict(evidence.overrides({"method": method, "seed": 3}, Sizes(**QUICK)))
            assert given["seed"] == "3" and ("steps" in given) == (method not in ("uce", "speed"))


def test_counts_are_pooled_and_the_strongest_member_is_of_all_seeds():
    (first, second, *_) = evidence.grid(["star"], [0, 1], ["esd"], SIZES, {})
    members = [{"members": {"a": [9, 10], "b": [6, 10]}}, {"members": {"a": [0, 10], "b": [7, 10]}}]
    lines = [line(first, (1, 10), 2.0, soft=members[0]), line(second, (3, 30), 4.0, soft=members[1])]
    found = evidence_table.pooled(lines)
    assert found["shares"]["plain"] == (4, 40) and found["values"]["clip_score"] == 3.0
    assert found["attacks"] == {"soft": (13, 20)}
    low, high = wilson(4, 40)
    assert evidence_table.rate((4, 40)) == f"10 % ({100 * low:.0f} to {100 * high:.0f})"
    assert evidence_table.rate((0, 0)) == "-"


def test_the_table_says_what_was_not_run_and_which_attack_is_worst(tmp_path):
    (cell,) = evidence.grid(["star"], [0], ["esd"], SIZES, {})
    attacks = {
        "tina": {"count": 10, "n": 10},
        "cce": {"count": 9, "n": 10},
        "p4d-n": {"count": 2, "n": 10},
        "p4d-k": {"count": 0, "n": 0},
    }
    text = evidence_table.text([line(cell, **attacks)], "python -m benchmarks evidence", ["star", "red"], METHODS)
    rows = {row.split("|")[1].strip(): row for row in text.split("**red**")[0].splitlines() if row.startswith("| `")}
    assert "not run" in rows["`stereo`"] and "not run" not in rows["`esd`"]
    worst = [part.strip() for part in text.splitlines()[6 + METHODS.index("esd")].split("|")]
    assert worst[5:7] == [f"{evidence_table.rate((2, 10))}, p4d-n", f"{evidence_table.rate((9, 10))}, cce"]
    assert "1 lines (a concept, a seed, a method) in 0.5 h" in text and "2 cores of a CPU; jax 1" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    evidence_table.into_page(page, r"new \1")
    assert page.read_text() == f"before\n{START}\nnew \\1\n{END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="has no"):
        evidence_table.into_page(page, "x")


def test_an_oracle_that_is_not_named_again_stays_in_the_table(tmp_path):
    (tmp_path / "x.safetensors").write_text("x")
    oracles = {"star": str(tmp_path)}
    (cell,) = evidence.grid(["star"], [0], [ORACLE], SIZES, oracles)
    for given in (oracles, {}):
        assert evidence.lines([line(cell)], *ALL, SIZES, given) == [line(cell)]
    assert evidence.lines([line(cell)], *ALL, Sizes(8, 8), {}) == []


@pytest.mark.parametrize("size", [(), ("--first",)])
def test_the_committed_page_is_what_the_script_writes(tmp_path, capsys, size):
    page = tmp_path / "evidence.md"
    page.write_text(evidence.PAGE.read_text("utf-8"), "utf-8")
    evidence.main(["--table", *size, "--page", str(page)])
    assert page.read_text("utf-8") == evidence.PAGE.read_text("utf-8")
    assert capsys.readouterr().out.count("**") == 6


def smallest(tmp_path, *more) -> list[str]:
    argv = ["--concepts", "star", "--seeds", "0", "--methods", "base", "uce", "nothing", "--attacks", "none"]
    argv += ["--images", "2", "--cases", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "x.jsonl")]
    return argv + list(more)


def test_what_was_measured_is_not_measured_again_and_the_page_has_it(tmp_path, capsys, monkeypatch):
    """With an erasure and an evaluation that only say what they were asked for."""
    asked = []

    def evaluate(models, **given):
        names = [pathlib.Path(model).name for model in models]
        asked.append((names, given["seeds"], given["images"], given["cases"], given["attacks"]))
        found = {"count": len(names), "n": 2, "value": 1.5}
        row = {"figures": dict.fromkeys((*evidence_table.SHARES, *evidence_table.VALUES), found), "attacks": {}}
        return {"rows": [row | {"erase_seconds": 1, "seconds": 2.5, "unet_evaluations": 2}] * (1 + len(names))}

    monkeypatch.setattr("aegis_jax.evaluate", evaluate)
    monkeypatch.setattr("aegis_jax.erase", lambda *args, out, **given: out.mkdir(parents=True, exist_ok=True))
    page = tmp_path / "page.md"
    page.write_text(f"{START}{END}")
    evidence.main(smallest(tmp_path, "--page", str(page)))
    each = ("0", 2, 1, "none")
    assert asked == [([], *each), (["uce"], *each), (["uce"], *each)]  # the last for the page of all together
    shown = capsys.readouterr().out
    assert re.search(r"`base` \| 1 \| 0 %.*\n\| `uce` \| 1 \| 50 %.*\n\| `nothing` \| 0 \| not run", shown)
    assert "| `uce` | 1 | 50 %" in page.read_text() and "`aegis+` | 0 | not run" in page.read_text()
    evidence.main(smallest(tmp_path, "--seeds", "0", "1"))
    assert [names for names, seed, *_ in asked[3:] if seed == "1"] == [[], ["uce"], ["uce"]] and len(asked) == 7


@pytest.mark.slow
def test_the_smallest_run_of_all(tmp_path, capsys, monkeypatch):
    """Base and a closed form, no attack, for real; the second time nothing is measured."""
    evidence.main(smallest(tmp_path))
    found = {one["cell"]["method"]: one["figures"] for one in cells.read(tmp_path / "x.jsonl")}
    assert list(found) == ["base", "uce"] and found["base"]["attacks"] == {}
    assert found["base"]["shares"]["plain"] == {"count": 2, "n": 2}  # the base draws stars
    assert found["uce"]["shares"]["plain"]["count"] < 2 and found["uce"]["values"]["frechet_judge_base"] > 0
    first = capsys.readouterr().out
    monkeypatch.setattr("aegis_jax.report.measure.Bench.measure", None)
    evidence.main(smallest(tmp_path))
    assert capsys.readouterr().out == first
