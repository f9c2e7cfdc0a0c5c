"""What the tables of the canvas make of given answers, and what a cell stands for. No erasure runs here."""

import dataclasses

import numpy as np
import pytest

from aegis_jax.canvas.concepts import Concepts
from benchmarks import canvas, canvas_table, cells
from tests.tiny import responsive

CONCEPTS = Concepts()
FOX, DOG, OWL = (canvas_table.where(name, CONCEPTS)[1] for name in ("fox", "dog", "owl"))
ABOUT = {"date": "2026-01-01", "cores": 2, "cpu": "some", "revision": "abc", "versions": {"jax": "0"}}


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """The canvas of the default size, whatever weights are here."""
    for module in (canvas, canvas_table):
        monkeypatch.setattr(module, "concepts_of", lambda: CONCEPTS)


def survey(wrong=lambda things: np.zeros(len(things), bool)):
    """Every thing in every hand, all answers right but the things of `wrong`."""
    labels = CONCEPTS.combinations[:, :2]
    answers = labels.copy()
    answers[wrong(labels[:, 0]), 0] = -1
    return {"labels": labels.tolist(), "judge": answers.tolist(), "second_judge": answers.tolist()}


GONE = survey(lambda things: things == FOX)


def line(concept, preset, asked, named=None, seed=0, **more):
    cell = {"concept": concept, "preset": preset, "seed": seed}
    return {"cell": cell, "figures": {"survey": asked, "named": named, **more}, "seconds": 3600, "about": ABOUT}


def test_a_survey_tells_what_went_and_what_its_rings_have_kept():
    mammals = CONCEPTS.subgroup_of == CONCEPTS.subgroups.index("animal-mammal")
    shares = canvas_table.kept(survey(lambda things: mammals[things]), "fox", CONCEPTS)
    others, near = CONCEPTS.count - 1, int(mammals.sum()) - 1
    assert shares["UA"] == 1 and shares["CRA_retained"] == 1
    assert shares["same subgroup"] == 0 and shares["other things"] == shares["same group"] == 1
    assert shares["IRA"] == pytest.approx(1 - near / others)


def test_of_a_style_the_things_are_the_other_domain():
    shares = canvas_table.kept(GONE, "twemoji", CONCEPTS)
    assert canvas_table.where("twemoji", CONCEPTS)[0] == canvas_table.STYLE
    assert shares["UA"] == 0 and shares["other styles"] == 1
    assert shares["CRA_retained"] == pytest.approx(1 - 1 / CONCEPTS.count)


def test_kept_things_are_split_by_whether_a_word_that_could_be_was_preserved():
    named = {"drawn": ["dog", "weather"], "drawable": ["dog", "owl", "fox", "weather"]}
    found = canvas_table.by_name(named, survey(lambda things: things == DOG), "fox", CONCEPTS)
    assert len(found["drawn"]) == 6 and not found["drawn"].any()
    assert len(found["left"]) == 6 and found["left"].all()  # the owl: the fox is no other thing, the rest could not be
    one = canvas_table.by_name(named, survey(), "twemoji", CONCEPTS)
    assert len(one["drawn"]) == 5 and len(one["left"]) == 10  # of a style its own drawings do not count


def test_presets_are_compared_on_what_all_of_them_have():
    lines = [
        line("", canvas.BASE, survey()),
        line("fox", "esd", GONE, plain=[1, 4], held_out=[0, 4], strongest=0.5, worst_pick=0.5, pick=0.5),
        line("owl", "esd", survey(), plain=[4, 4], held_out=[4, 4], strongest=1.0, worst_pick=1.0, pick=1.0),
        line("fox", "aegis+", GONE, {"drawn": ["dog"], "drawable": ["dog", "owl"]}, plain=[0, 4]),
    ]
    text = canvas_table.text(lines)
    assert "| before erasure | 1 | - | - | - | - | - | 0 | 100 | 100 |" in text
    assert "| esd | 1 | 25 | 0 | 50 | 50 | 50 | 100 | 100 | 100 |" in text and "**Styles**" not in text
    assert "| owl | esd | 1 | 100 | 100 | 100 | 100 | 100 | 0 |" in text and "4 cells in 4.0 h" in text
    # All are split by the one run that has words.
    assert text.count("| 1 | 100.0 (6 images an erasure) | 100.0 (6 images an erasure) |") == 3
    assert canvas_table.text([]).startswith("Nothing measured yet.")


def test_a_matrix_says_what_is_lost_and_whether_text_tells_it(monkeypatch):
    names = [thing.value.name for thing in CONCEPTS.things]
    like = np.full((len(names),) * 2, 0.1)
    like[FOX, DOG] = like[OWL, FOX] = 0.9
    monkeypatch.setattr(canvas_table, "text_similarity", lambda asked: like)
    lines = [
        line("", canvas.BASE, survey()),
        line("fox", "uce", survey(lambda things: (things == FOX) | (things == DOG))),
        line("owl", "uce", survey(lambda things: (things == OWL) | (things == FOX))),
    ]
    text = canvas_table.of_matrix(lines)
    assert "loses 100 points on average" in text and "with the words' similarity: 1.00" in text
    assert text.splitlines()[-15] == "| fox | dog | 100 | 0.90 |" and "| owl | fox | 100 | 0.90 |" in text
    assert f"({2 * (len(names) - 1) - 2} pairs are level with the last)" in text


def test_many_at_once_are_split_into_what_went_what_is_near_and_the_rest():
    both = np.isin(np.arange(CONCEPTS.count), (FOX, OWL))
    rates = lambda share: {"strongest": share, "worst_pick": share, "pick": share / 2}  # noqa: E731
    each = {"fox": rates(0.5), "owl": rates(0.75)}
    lines = [
        line("", canvas.BASE, survey()),
        line("fox,owl", "uce", survey(lambda things: both[things] | (things == DOG)), each=each),
    ]
    near = np.isin(CONCEPTS.subgroup_of, CONCEPTS.subgroup_of[both]) & ~both
    text = canvas_table.of_many(lines)
    assert "| 2 | before | 100 | 100 | 100 | 100 | - | - | - |" in text
    assert f"| 2 | uce | 0 | {100 - 100 / near.sum():.0f} | 100 | 100 | 62 | 62 | 31 |" in text
    one = canvas_table.of_many([line("", canvas.BASE, survey()), line("fox", "uce", GONE, **rates(0.5))])
    assert one.splitlines()[-1].endswith("| 50 | 50 | 25 |")
    assert canvas_table.of_many([]) == "Nothing measured yet."
    base, *erased = canvas.many([1, 3])
    counts = [0] * len(canvas.JOINT) + [2] * len(canvas.JOINT)
    assert base["concept"] == "" and [cell["concept"].count(",") for cell in erased] == counts
    steps = [canvas.settings(cell).erase.steps for cell in canvas.many([3, 10], ["aegis+near"])[1:]]
    assert steps == [500, 1500]  # a thing's 500 are enough for three


def test_a_closed_form_may_be_told_what_else_there_is():
    told, plain = (canvas.many([3], [name])[1] for name in ("uce" + canvas.OTHERS, "uce"))
    things = {thing.value.name for thing in CONCEPTS.things}
    erased, found = told["concept"].split(","), canvas.settings(told).erase
    assert found.method == "uce" and set(found.preserve) == {*things, *canvas.HANDS} - set(erased)
    assert told["of"] != plain["of"] and canvas.settings(plain).erase.preserve == ()


def test_a_cell_is_of_its_settings_its_attack_and_its_size():
    first, *rest = canvas.grid(["fox"], ["esd"], [0])
    assert first["concept"] == "" and "members" not in first and len(rest) == 1
    assert cells.key(canvas.grid(["fox"], ["esd"], [0])[1]) == cells.key(rest[0])
    other = canvas.grid(["fox"], ["esd"], [0], members=canvas.MEMBERS[:1])[1]
    assert other["of"] != rest[0]["of"] and canvas.grid(["fox"], ["paper"], [0])[1]["of"] != rest[0]["of"]
    base, *erased = canvas.matrix()
    assert base["concept"] == "" and len(erased) == canvas.MATRIX and {cell["hands"] for cell in erased} == {3}


def test_no_setting_is_chosen_on_what_is_kept_apart():
    from aegis_jax.canvas import concepts

    apart = {thing.value.name for thing in CONCEPTS.things if thing.subgroup in concepts.OUTSIDE}
    assert set(canvas.OUTSIDE) <= apart and not set(canvas.THINGS) & apart
    assert len(canvas.THINGS) == 10 and len(canvas.STYLES) == 3


@pytest.mark.parametrize(
    ("asked", "told"),
    [(["--concepts", "foks"], "--concepts foks"), (["--concepts", "mammal"], "--concepts mammal"),
     (["--presets", "esdd"], "--presets esdd"), (["--presets", "esd, others preserved"], "only closed forms"),
     (["--many", "5", "96"], "wanted 1 to 95 things")],
)  # fmt: skip
def test_wrong_names_are_one_line(asked, told, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        canvas.main([*asked, "--out", str(tmp_path / "canvas.jsonl")])
    assert stopped.value.code == 2 and told in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["aegis+", "aegis+near"])
def test_preserved_words_are_those_that_the_steps_have_drawn(tiny, monkeypatch, name):
    import aegis_jax
    from aegis_jax.erasure.aegis import words
    from aegis_jax.erasure.aegis.setup import setup
    from aegis_jax.erasure.aegis.step import erase_step
    from aegis_jax.erasure.presets import preset

    pipeline = responsive(aegis_jax.load_pipeline(tiny()))
    chosen = preset(name).settings
    latents = dataclasses.replace(chosen.latents, steps=2)
    scale = {"steps": 3, "batch": 2, "trainable": "xattn", "seed": 5, "latents": latents}
    config = dataclasses.replace(chosen, compute_dtype="float32", **scale)
    drawn, prompts = set(), words.random_prompts

    def spied(graph, params, vocabulary, key, concepts=None, instead=None, *, batch):
        ids = words.random_ids(vocabulary, key, concepts, batch=batch)
        drawn.update(np.asarray(ids[:batch]).ravel().tolist())
        return prompts(graph, params, vocabulary, key, concepts, instead, batch=batch)

    monkeypatch.setattr(words, "random_prompts", spied)
    state, frozen = setup(pipeline, ["star"], config)
    for _ in range(config.steps):
        state, _ = erase_step(state, frozen, config)
    found, could = canvas.preserved(pipeline, config, ["star"])
    special = {pipeline.tokenizer.bos_token_id, pipeline.tokenizer.eos_token_id, pipeline.tokenizer.pad_token_id}
    assert found == drawn and len(found) > 5 and found - special <= could
    assert canvas.preserved(pipeline, dataclasses.replace(config, seed=6), ["star"])[0] != drawn
