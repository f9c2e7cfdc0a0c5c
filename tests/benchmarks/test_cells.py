"""The studies on the world: which cells there are, going on after an interruption, the tables."""

import json

import cells
import quality_vs_cost
import world_study
import world_study_sets


def stand_in(cell):
    figures = {column: 0.5 for column in cells.COLUMNS} | {"attacked_each": [0.5]}
    return cell | {"identity": cells.identity(cell), "figures": figures}


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(cells, "run_cell", lambda cell: (ran.append(cell["name"]), stand_in(cell))[1])
    path = tmp_path / "deep" / "cells.jsonl"
    todo = quality_vs_cost.chosen("screen")
    assert len(todo) == 6 * 3 and len({cells.identity(cell) for cell in todo}) == len(todo)
    cells.run(todo[:4], path)
    cells.run(todo[:6], path)
    assert ran == [cell["name"] for cell in todo[:6]]  # none twice
    text = quality_vs_cost.table(path)
    assert (
        "| screen | each step |" in text and "| never |" in text and text.count("50.0%") == 6 * (1 + len(cells.COLUMNS))
    )
    assert len(quality_vs_cost.chosen("final", (1, 50))) == 2 * 3 * 3
    quality_vs_cost.main(["table", "--out", str(path), "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["evaluations"]["screen"]["never"]["total"] > 0


def test_world_study_tables_its_cells(tmp_path, monkeypatch):
    sets = {"s": {"measure": cells.SCREEN, "seeds": (0, 1), "concepts": ("star",), "settings": {"as it is": None}}}
    monkeypatch.setitem(__import__("sys").modules, "world_study_sets", type("Sets", (), {"SETS": sets}))
    monkeypatch.setattr(cells, "run_cell", stand_in)
    path = tmp_path / "cells.jsonl"
    world_study.main(["run", "s", "--out", str(path)])
    assert "| s | star | as it is | 2 | 50.0% |" in world_study.table(path).splitlines()[-1]


def test_identity_depends_on_all_settings():
    cell = quality_vs_cost.chosen("screen")[0]
    others = [{**cell, "seed": 5}, {**cell, "images": 7}, {**cell, "attack": {"steps": 1}}, {**cell, "overrides": None}]
    assert len({cells.identity(c) for c in (cell, *others)}) == 5


def test_every_recorded_cell_belongs_to_a_set():
    """Else its settings could not be read from the sets. The world that it was measured on may have changed since."""

    def settings(identity):
        return json.dumps(json.loads(identity)[:-1])

    chosen = [cell for name in world_study_sets.SETS for cell in world_study.chosen(name)]
    known = {settings(cells.identity(cell)): cell["name"] for cell in chosen}
    recorded = cells.read(world_study.OUT)
    assert recorded and all(known.get(settings(cell["identity"])) == cell["name"] for cell in recorded)
