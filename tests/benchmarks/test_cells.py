"""A study's file: cells measured once, gone on with after any interruption, and what is made of the lines."""

import json
import math

import pytest

from benchmarks import cells

CELLS = cells.grid(seed=(0, 1), concept=("star", "red"))


def plain(cell):
    return {"attacked": 0.25 + cell["seed"], "each": [1, 2]}


def test_a_grid_has_every_combination_first_axis_slowest():
    assert CELLS == [{"seed": s, "concept": c} for s in (0, 1) for c in ("star", "red")]


def test_a_study_goes_on_where_it_stopped(tmp_path):
    path, measured = tmp_path / "deep" / "cells.jsonl", []

    def dies(cell):
        if len(measured) == 3:
            raise RuntimeError("no memory")
        measured.append(cell)
        return plain(cell)

    with pytest.raises(RuntimeError):
        cells.run(CELLS, dies, path)
    cells.run(CELLS, lambda cell: (measured.append(cell), plain(cell))[1], path)
    assert measured == CELLS == [line["cell"] for line in cells.read(path)]  # none twice, none left out
    cells.run(CELLS, dies, path)
    line = cells.read(path)[0]
    assert line["figures"] == {"attacked": 0.25, "each": [1, 2]} and line["seconds"] >= 0
    assert line["about"]["versions"]["jax"] and line["about"]["date"] and "revision" in line["about"]


@pytest.mark.parametrize("left", [1, 20])
def test_half_a_line_is_measured_again(tmp_path, left):
    path = tmp_path / "cells.jsonl"
    cells.run(CELLS, plain, path)
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    path.write_bytes(whole[: last + left])
    assert [line["cell"] for line in cells.read(path)] == CELLS[:-1]
    cells.run(CELLS, plain, path)
    assert [line["cell"] for line in cells.read(path)] == CELLS
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_what_is_written_in_another_order_is_the_same_cell(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells.run([{"a": (1, 2), "b": None}], lambda cell: {}, path)
    cells.run([{"b": None, "a": [1, 2]}], lambda cell: 1 / 0, path)
    assert len(cells.read(path)) == 1


def test_workers_share_a_study(tmp_path):
    path = tmp_path / "cells.jsonl"
    for share in ("0/2", "1/2"):
        cells.run(CELLS, plain, path, share=share)
    assert sorted(map(cells.key, CELLS)) == sorted(cells.key(line["cell"]) for line in cells.read(path))


def test_means_over_seeds(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells.run([*CELLS, {"seed": 0, "concept": "striped"}], plain, path)
    (star, figures), _, (_, single) = cells.over_seeds(cells.read(path))
    assert star == {"concept": "star"}
    assert figures == {"attacked": {"mean": 0.75, "error": 0.5, "seeds": 2}}
    assert single["attacked"]["seeds"] == 1 and math.isnan(single["attacked"]["error"])
