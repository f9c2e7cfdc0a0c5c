"""The embedded worlds behind one interface: what each promises, and what is said while weights are absent."""

import dataclasses

import numpy as np
import pytest

import aegis_jax
from aegis_jax import cli, judges, worlds
from aegis_jax.errors import AegisError
from aegis_jax.evaluation import world as evaluation
from aegis_jax.io import hub
from aegis_jax.run import picture

BOTH = pytest.mark.parametrize("name", worlds.NAMES)
CONCEPTS = {"world": ("star", "red"), "canvas": ("fox", "twemoji", "mammal")}


@BOTH
def test_prompts_say_what_they_are_asked_for(name):
    world, rng = worlds.find(name), np.random.default_rng(0)
    names = list(world.attributes)
    assert world.combinations.shape[1] == len(names) == 3 and world.name == name
    for text in CONCEPTS[name]:
        concept = evaluation.find(text, name)
        assert concept.value.name == text and concept.within == name
        for held_out in (False, True):
            for prompt in evaluation.concept_prompts(concept, 40, 0, held_out=held_out):
                found = [(w, i) for w, a, i in world.named(prompt) if a == concept.attribute]
                words = concept.value.held_out[:1] if held_out else concept.value.seen
                assert len(found) == 1 and found[0][0] in words and found[0][1] == concept.index
        for prompt in evaluation.open_prompts(concept, 40, 0):
            assert concept.attribute not in {a for _, a, _ in world.named(prompt)}
        prompts, labels = evaluation.other_prompts(concept, 60, 0)
        assert (labels[:, concept.axis] != concept.index).all()
        for prompt, row in zip(prompts, labels, strict=True):
            assert all(row[names.index(a)] == i for _, a, i in world.named(prompt))
        assert len({world.said(rng, world.combinations[0]) for _ in range(60)}) > 1


@BOTH
def test_rings_and_neighbours_are_other_values(name):
    world = worlds.find(name)
    for text in CONCEPTS[name]:
        concept = evaluation.find(text, name)
        rings = world.rings(concept.attribute, concept.index)
        others = sorted(i for ring in rings.values() for i in ring)
        assert others == [i for i in range(len(world.attributes[concept.attribute])) if i != concept.index]
        beside = world.beside(concept.attribute, concept.index)
        assert len(set(beside)) == 2 and set(beside) <= set(others)


def test_a_picture_of_the_canvas_shows_one_thing_in_several_hands():
    canvas = worlds.find("canvas")
    rows = picture.rows(("fox",), 3, world=canvas)
    assert rows[0].prompts[0] == "a noto drawing of a fox" and rows[0].is_erased
    hands = [[i for _, a, i in canvas.named(prompt) if a == "style"] for prompt in rows[0].prompts]
    assert hands == [[0], [1], [2]] and "reynard" in rows[1].prompts[0]
    assert [row.is_erased for row in rows] == [True, True, False, False]
    rows = picture.rows(("twemoji",), 3, world=canvas)
    assert len({prompt for prompt in rows[0].prompts}) == 3 and all("twemoji" in p for p in rows[0].prompts)


def test_kept_by_ring_asks_each_ring_and_reads_its_labels(monkeypatch):
    """A model that draws everything right but what is in the fox's own subgroup."""
    fox, asked = evaluation.find("fox", "canvas"), []
    canvas = fox.world
    near = set(canvas.rings("thing", fox.index)["same subgroup"])

    def sample(pipeline, prompts, **how):
        asked.extend(prompts)
        return [dict((a, i) for _, a, i in canvas.named(prompt))["thing"] for prompt in prompts]

    answers = lambda images: {"thing": np.array([-1 if i in near else i for i in images])}  # noqa: E731
    monkeypatch.setattr(evaluation, "sample", sample)
    monkeypatch.setattr(worlds, "find", lambda name: dataclasses.replace(canvas, judge=lambda name: answers))
    found = evaluation.kept_by_ring(None, fox, n=20)
    assert found == {"same subgroup": 0.0, "same group": 1.0, "other things": 1.0} and len(asked) == 60


def test_without_its_weights_the_canvas_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(hub.EMBEDDED, "canvas", tmp_path / "gone")
    message = "the canvas's weights are not in this version; train them by `python -m tools.canvas.train --out DIR`"
    for what in (aegis_jax.load_pipeline, judges.load):
        with pytest.raises(AegisError, match="weights are not in this version; train them"):
            what("canvas")
    assert cli.main(["erase", "--model", "canvas", "--concept", "fox", "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_model_is_of_the_world_whose_unet_it_has(monkeypatch, tmp_path):
    pipeline = aegis_jax.load_pipeline("world")
    found, original = worlds.of(pipeline)
    assert found is worlds.find("world") and original.unet.config == pipeline.unet.config
    other = dataclasses.replace(pipeline, unet=dataclasses.replace(pipeline.unet, config={"another": 1}))
    assert worlds.of(other) is None
