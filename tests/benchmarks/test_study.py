"""The study's bookkeeping: what a cell stands for, whom a final meets, what the table says. No erasure runs here."""

import dataclasses

import pytest

from aegis_jax.attacks import family
from aegis_jax.erasure import presets
from benchmarks import cells, study


def figures(**more):
    shown = dict.fromkeys((key for key, _ in study.COLUMNS), 0.5)
    return shown | {"evaluations_per_step": 36.4, "attack": {"ranking": list(family.FAMILY)[:5]}} | more


def line(cell, **more):
    return {"cell": cell, "figures": figures(**more)}


def test_a_changed_preset_or_attack_is_another_cell(monkeypatch):
    def key():
        return cells.key(study.screening(["esd"], ["star"])[0])

    before = key()
    assert key() == before
    with monkeypatch.context() as patch:
        changed = dataclasses.replace(presets.PRESETS["esd"].settings, eta=2.0)
        patch.setitem(presets.PRESETS, "esd", dataclasses.replace(presets.PRESETS["esd"], settings=changed))
        assert key() != before
    with monkeypatch.context() as patch:
        name, member = next(iter(family.FAMILY.items()))
        patch.setitem(family.FAMILY, name, dataclasses.replace(member, steps=member.steps + 1))
        assert key() != before
    assert key() == before


def test_seeds_of_finals_and_screenings_are_apart():
    finals = study.finals(["esd"], ["star"])
    assert len({cell["seed"] for cell in finals}) == len({cell["evaluation_seed"] for cell in finals}) == 3
    assert study.SCREENING["evaluation_seed"] not in {cell["evaluation_seed"] for cell in finals}


def test_a_final_meets_the_strongest_of_its_own_screening():
    first, *_ = study.finals(["esd"], ["star"])
    mine, other = study.screening(["esd"], ["star"])[0], study.screening(["aegis+"], ["star"])[0]
    names = list(family.FAMILY)
    found = [line(other, attack={"ranking": names[5:]}), line(mine, attack={"ranking": names[-3:]})]
    chosen = study._strongest(first, found)
    assert len(chosen) == 3 and set(chosen) <= {*names[-3:], family.ALWAYS} and family.ALWAYS in chosen
    with pytest.raises(SystemExit, match="screen first: esd on star"):
        study._strongest(first, found[:1])


def test_what_was_trained_longer_is_another_cell_that_meets_the_same_members():
    usual, longer = study.finals(["esd"], ["star"])[0], study.finals(["esd"], ["star"], steps=1500)[0]
    assert longer["of"] != usual["of"] and study.settings(longer).erase.steps == 1500
    mine = line(study.screening(["esd"], ["star"])[0], attack={"ranking": list(family.FAMILY)})
    assert study._strongest(longer, [mine]) == study._strongest(usual, [mine])
    assert "esd, 1500 steps" in study.table([line(longer, plain=0.25)])


def test_every_value_of_the_world_is_a_cell_of_its_own():
    cells_of = study.every(["aegis+"])
    assert len({cell["concept"] for cell in cells_of}) == len(cells_of) == len(study.values()) == 18
    assert all(study.settings(cell).erase.steps != 1000 for cell in cells_of)
    longer = study.every(["aegis+"], ["heart"], 1000)
    assert [study.settings(cell).erase.steps for cell in longer] == [1000]
    assert study.values(but="valentine") == [name for name in study.values() if name != "heart"]


def test_the_table_of_values_counts_those_that_are_gone():
    usual, longer = study.every(["aegis+"], ["heart", "red"]), study.every(["aegis+"], ["heart"], 1000)
    shares = zip([*usual, *longer], (0.0501, 0.05, 0.0))
    rows = study.table_of_values([line(cell, plain=plain, same=1.0) for cell, plain in shares]).splitlines()
    assert rows[0] == "| value | aegis+ | aegis+, 1000 steps |" and len(rows) == 2 + 18 + 1
    assert "| heart | 5 / 50 / 100 / 50 | 0 / 50 / 100 / 50 |" in rows and "| red | 5 / 50 / 100 / 50 | - |" in rows
    assert rows[-1] == "| plain at most 5 % | 1 of 2 | 1 of 1 |"


def test_table():
    cell = study.screening(["esd"], ["star"])[0]
    rows = study.table([line(cell, plain=0.25), line(cell | {"seed": 1}, plain=0.75)]).splitlines()
    assert len(rows) == 3
    preset, concept, seeds, plain, *_, cost = (part.strip() for part in rows[2].strip("|").split("|"))
    assert (preset, concept, seeds, plain, cost) == ("esd", "star", "2", "50", "36")


def test_the_closed_forms_cells_are_told_apart_and_can_be_run():
    found = study.closed()
    assert len({cells.key(cell) for cell in found}) == len(found) == len(study.CLOSED) * len(study.CONCEPTS)
    for cell in found:
        run = study.settings(cell)
        assert run.erase.method == cell["preset"] and run.erase.steps == 1 and run.concepts == (cell["concept"],)
        assert cell["concept"] not in run.erase.preserve
        assert len(run.erase.preserve) == 17 or cell["preserve"] == "default"
    assert study._cost(study.settings(found[0]).erase) == {"evaluations_per_step": 0.0}
    assert study._late([{"L_e": 1.0, "L_e_before": 2.0}]) == {"L_e": 1.0, "L_e_before": 2.0}


def test_the_table_of_a_quick_pass_says_what_was_not_measured():
    cell = study.closed(["uce, others preserved"], ["star"], quick=True)[0]
    shown = {"plain": 0.25, "held_out": 0.5, "same": 1.0, "other": 1.0, "evaluations_per_step": 0.0}
    row = study.table([{"cell": cell, "figures": shown}]).splitlines()[2]
    wanted = "| uce, others preserved | star | 1 | 25 | 50 | - | - | - | - | 100 | 100 | 0 |"
    assert row == wanted and cell["members"] == "none"
