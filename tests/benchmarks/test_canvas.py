"""What the tables of the canvas make of given answers, and what a cell stands for. No erasure runs here."""

import dataclasses

import numpy as np
import pytest

from aegis_jax.canvas.concepts import Concepts
from benchmarks import canvas, canvas_table, cells
from tests.tiny import responsive

CONCEPTS = Concepts()
FOX = canvas_table.where("fox", CONCEPTS)[1]
ABOUT = {"date": "2026-01-01", "cores": 2, "cpu": "some", "revision": "abc", "versions": {"jax": "0"}}


def survey(wrong=lambda labels: np.zeros(len(labels), bool)):
    """Every thing in every hand, all answers right but the things of `wrong`."""
    labels = CONCEPTS.combinations[:, :2]
    answers = labels.copy()
    answers[wrong(labels), 0] = -1
    return {"labels": labels.tolist(), "judge": answers.tolist(), "second_judge": answers.tolist()}


def line(concept, preset, asked, **more):
    cell = {"concept": concept, "preset": preset, "seed": 0}
    return {"cell": cell, "figures": {"survey": asked, "named": None, **more}, "seconds": 3600, "about": ABOUT}


def of(name):
    return CONCEPTS.subgroup_of == CONCEPTS.subgroups.index(name)


def test_a_survey_tells_what_went_and_what_its_rings_have_kept():
    mammals = of("animal-mammal")
    found = canvas_table.kept(survey(lambda labels: mammals[labels[:, 0]]), "fox", CONCEPTS)
    shares = {name: float(right.mean()) for name, right in found.items()}
    others = CONCEPTS.count - 1
    near = int(mammals.sum()) - 1
    assert shares["UA"] == 1 and shares["CRA"] == 1 and shares["same subgroup"] == 0 and shares["other things"] == 1
    assert shares["IRA"] == pytest.approx(1 - near / others) and shares["same group"] == 1
    assert len(found["UA"]) == 6 and len(found["IRA"]) == 6 * others


def test_of_a_style_the_things_are_the_other_domain():
    twemoji = canvas_table.where("twemoji", CONCEPTS)
    found = canvas_table.kept(survey(lambda labels: labels[:, 0] == FOX), "twemoji", CONCEPTS)
    assert twemoji[0] == canvas_table.STYLE and found["UA"].mean() == 0 and found["other styles"].mean() == 1
    assert found["CRA"].mean() == pytest.approx(1 - 1 / CONCEPTS.count)


def test_kept_things_are_split_by_whether_a_preserved_word_named_them():
    dog = canvas_table.where("dog", CONCEPTS)[1]
    found = canvas_table.by_name(["dog", "fox", "weather"], survey(lambda x: x[:, 0] == dog), "fox", CONCEPTS)
    assert len(found["named"]) == 6 and not found["named"].any()  # the fox itself is no other thing
    assert len(found["unnamed"]) == 6 * (CONCEPTS.count - 2) and found["unnamed"].all()


def test_the_text_has_a_base_row_and_splits_presets_without_words_alike():
    gone = survey(lambda labels: labels[:, 0] == FOX)
    lines = [
        line("", canvas.BASE, survey()),
        line("fox", "esd", gone, plain=[1, 4], held_out=[0, 4], strongest=0.5, worst_pick=0.5, pick=0.5),
        line("fox", "aegis+", gone, plain=[0, 4], held_out=[0, 4], strongest=0.25, worst_pick=0, pick=0)
        | {"figures": {"survey": gone, "named": ["dog"], "plain": [0, 4]}},
    ]
    text = canvas_table.text(lines, canvas.OUTSIDE)
    assert "| before erasure | 1 | - | - | - | - | - | 0 | 100 | 100 |" in text
    assert "| esd | 1 | 25 | 0 | 50 | 50 | 50 | 100 |" in text and "**Styles**" not in text
    assert text.count("100.0 of 6 |") == 3 and "3 cells in 3.0 h" in text  # base, esd, aegis+


def test_a_cell_is_of_its_settings_its_attack_and_its_size():
    first, *rest = canvas.grid(["fox"], ["esd"], [0])
    assert first["concept"] == "" and "members" not in first and len(rest) == 1
    assert cells.key(canvas.grid(["fox"], ["esd"], [0])[1]) == cells.key(rest[0])
    other = canvas.grid(["fox"], ["esd"], [0], members=canvas.MEMBERS[:1])[1]
    assert other["of"] != rest[0]["of"] and canvas.grid(["fox"], ["paper"], [0])[1]["of"] != rest[0]["of"]


def test_no_setting_is_chosen_on_what_is_kept_apart():
    from aegis_jax.canvas import concepts

    apart = {thing.value.name for thing in CONCEPTS.things if thing.subgroup in concepts.OUTSIDE}
    assert set(canvas.OUTSIDE) <= apart and not set(canvas.THINGS) & apart
    assert len(canvas.THINGS) == 10 and len(canvas.STYLES) == 3


def test_preserved_words_are_those_that_the_steps_have_drawn(tiny, monkeypatch):
    import aegis_jax
    from aegis_jax.erasure.aegis import words
    from aegis_jax.erasure.aegis.setup import setup
    from aegis_jax.erasure.aegis.step import erase_step
    from aegis_jax.erasure.presets import preset

    pipeline = responsive(aegis_jax.load_pipeline(tiny()))
    chosen = preset("aegis+").settings
    latents = dataclasses.replace(chosen.latents, steps=2)
    scale = {"steps": 3, "batch": 2, "trainable": "xattn", "seed": 5, "latents": latents}
    config = dataclasses.replace(chosen, compute_dtype="float32", **scale)
    drawn, prompts = set(), words.random_prompts

    def spied(graph, params, vocabulary, key, concepts=None, *, batch):
        ids = words.random_ids(vocabulary, key, concepts, batch=batch)
        drawn.update(np.asarray(ids[:batch]).ravel().tolist())
        return prompts(graph, params, vocabulary, key, concepts, batch=batch)

    monkeypatch.setattr(words, "random_prompts", spied)
    state, frozen = setup(pipeline, ["star"], config)
    for _ in range(config.steps):
        state, _ = erase_step(state, frozen, config)
    found = canvas.preserved(pipeline, config, ["star"])
    assert found == drawn and len(found) > 5
    assert canvas.preserved(pipeline, dataclasses.replace(config, seed=6), ["star"]) != drawn
