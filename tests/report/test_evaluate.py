"""`aegis evaluate`: what it refuses, what it counts, and that it goes on where it stopped."""

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aegis_jax import cli
from aegis_jax.attacks import METHODS
from aegis_jax.attacks.given import Pictures
from aegis_jax.attacks.result import FAILED, NOT_NEEDED, SUCCEEDED, AttackResult
from aegis_jax.cli import main
from aegis_jax.diffusion.conditioning import encode, per_latent
from aegis_jax.diffusion.sample import latent_shape, sample
from aegis_jax.evaluation import attacked, cases, world
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.report import arguments
from aegis_jax.report.embedded import Embedded
from aegis_jax.report.measure import Bench, Measured
from aegis_jax.report.plan import SEEDS, key, model_digest, plan
from aegis_jax.report.pooled import pooled
from aegis_jax.world import judge
from tests.report.conftest import ATTACKS, command

STAR = world.find("star")


def refused(capsys, *argv) -> str:
    assert main(["evaluate", *map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aegis: error: ")
    return line


WORLD = ["--base", "world", "--concept", "star"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--base", "world", "--concept", "dog"], ["'dog'", "not one value of the world"]),
        (["--base", "nowhere", "--concept", "star"], ["nowhere"]),
        (["nowhere", *WORLD], ["nowhere"]),
        ([*WORLD, "--attacks", "gcg"], ["'gcg' is unknown", "unlearndiffatk"]),
        ([*WORLD, "--attacks", "tina", "--attack.cce.steps=1"], ["--attack.cce.steps", "--attacks has tina"]),
        ([*WORLD, "--attack.tina.speed=1"], ["tina has no such setting", "iterations"]),
        ([*WORLD, "--attack.tina.iterations=many"], ["--attack.tina.iterations=many", "wanted int"]),
        ([*WORLD, "--attack.tina.iterations=0"], ["iterations=0", "more than 0"]),
        ([*WORLD, "--attack.p4d-n.check_every=7"], ["no multiple of check_every=7"]),
        ([*WORLD, "--attack.soft-prompt.members=mine"], ["'mine' is not in the family"]),
        ([*WORLD, "--attack.unlearndiffatk.tokens=30"], ["30 learnt tokens"]),
        ([*WORLD, "--attack.unlearndiffatk.place=nowhere"], ["place='nowhere'"]),
        ([*WORLD, "--attack.recall.direction=up"], ["direction='up'", "ascend, descend"]),
        ([*WORLD, "--attack.recall.strength=2"], ["strength=2.0", "leaves one of 25 steps"]),
        ([*WORLD, "--attack.revival.looks=9,5"], ["looks='9,5'", "ascending"]),
        ([*WORLD, "--attack.noise-probe.levels=0"], ["levels='0'"]),
        ([*WORLD, "--attack.completion-probe.levels=1"], ["levels='1'", "no step of 25"]),
        ([*WORLD, "--attack.inpainting-probe.masks=middle"], ["masks='middle'", "left"]),
        ([*WORLD, "--attack.ring-a-bell.population=2"], ["population=2", "at least 4"]),
        ([*WORLD, "--attack.word-search.budget=9"], ["budget=9", "below one generation"]),
        ([*WORLD, "--attack.soft-prompt.steps=0"], ["steps=0", "more than 0"]),
        ([*WORLD, "--attack.soft-prompt.members="], ["members=()"]),
        ([*WORLD, "--attack.cce.texts=poem"], ["texts='poem'", "style"]),
        ([*WORLD, "--attack.tina=5"], ["--attack.NAME.KEY=VALUE"]),
        ([*WORLD, "--baselines", "esdd"], ["'esdd'", "'esd'"]),
        ([*WORLD, "--baselines", "esd", "--config.speed=1"], ["'speed'"]),
        ([*WORLD, "--config", "missing.py"], ["--config missing.py", "name some by --baselines"]),
        ([*WORLD, "--config.speed=1"], ["--config.speed", "name some by --baselines"]),
        ([*WORLD, "--seeds", "0,x"], ["--seeds '0,x'"]),
        ([*WORLD, "--seeds", str(SEEDS)], ["--seeds"]),
        ([*WORLD, "--seeds", "1" * 5000], ["--seeds", "wanted whole numbers"]),
        ([*WORLD, "--images", "1"], ["--images 1"]),
        ([*WORLD, "--near", "heart,dog"], ["--near 'dog'", "another value"]),
        ([*WORLD, "--near", "pentagram"], ["--near 'pentagram'"]),
        ([*WORLD, "--attack.cce.initial=nothing"], ["initial='nothing'", "not one token"]),
        ([*WORLD, "--image-steps", "9"], ["--image-steps goes with another base"]),
        (["world", "world", *WORLD], ["stands in the table already"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_before_anything_starts(capsys, tmp_path, monkeypatch, argv, parts):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *argv, "--out", tmp_path / "out")
    assert all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    assert "holds no evaluation" in refused(capsys, *WORLD, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_model_that_is_not_the_worlds_needs_a_judge(capsys, tmp_path):
    from tests.run import untrained

    folder = untrained.write(tmp_path / "other")
    assert "is not an embedded world: give --judge" in refused(capsys, "--base", folder, "--concept", "star")
    assert "no model made of the base" in refused(capsys, folder, *WORLD)


def test_figures_are_of_the_models_and_prompts_they_name(report, evaluation):
    assert [row["name"] for row in report["rows"]] == ["base", "uce"]
    erased, judged = load_pipeline(evaluation / "baselines" / "uce" / "pipeline"), judge.load("judge")
    prompts, labels = world.other_prompts(STAR, 2, 1)
    images = sample(erased, prompts, seed=world.noise_seed(1, 2), steps=25, guidance=3.0)
    kept = sum(judged(images)["shape"] == labels[:, 0])
    assert report["rows"][1]["figures"]["same"] == pooled(
        [{"cell": {"seed": 1}, "figures": {"x": {"count": int(kept), "n": 2}}}], "x"
    )
    # UCE takes the star out of plain prompts, and the base has it.
    assert report["rows"][0]["figures"]["plain"]["share"] > report["rows"][1]["figures"]["plain"]["share"]


def test_outcomes_add_up_and_controls_stand_apart(report):
    for row in report["rows"]:
        assert list(row["attacks"]) == ATTACKS.split(",")
        for attack in row["attacks"].values():
            for found in (attack, attack["control"]):
                needed, succeeded, together = (
                    found[name] for name in ("no_attack_needed", "attack_succeeded", "together")
                )
                assert needed["count"] + succeeded["count"] == together["count"] == found["rate"]["count"]
                assert needed["count"] + succeeded["n"] == needed["n"] == together["n"] > 0
    base, erased = report["rows"]
    assert base["attacks"]["ring-a-bell"]["no_attack_needed"]["share"] == 1  # that is how cases are chosen
    assert base["attacks"]["ring-a-bell"]["control"]["no_attack_needed"]["share"] < 1


def planned(argv) -> list[tuple[str, str]]:
    """(row, cell) that a command asks for."""
    args, rest = cli._parser().parse_known_args(argv)
    settings, rest = arguments.attack_settings(rest)
    more = {"settings": settings, "overrides": cli._overrides(rest, allowed=True), **arguments.given(args)}
    what, _ = plan(args.models, args.base, args.concept, **more)
    return [(row.name, json.dumps(cell, sort_keys=True)) for row, cell in what.cells()]


def test_the_command_of_a_figure_asks_for_its_cells(report, evaluation):
    everything = planned(command(evaluation))
    for row in report["rows"]:
        for name, attack in row["attacks"].items():
            cells = planned(shlex.split(attack["command"])[1:])
            assert set(cells) <= set(everything)
            mine = [cell for cell in everything if cell[0] == row["name"] and json.loads(cell[1])["kind"] == name]
            assert mine and set(mine) <= set(cells)


def test_no_figure_depends_on_what_else_stands_in_the_table(evaluation):
    """The base's cells are the same with a baseline beside it and without."""
    alone = command(evaluation)
    at = alone.index("--baselines")
    everything = planned(command(evaluation))
    assert planned(alone[:at] + alone[at + 2 :]) == [cell for cell in everything if cell[0] == "base"]
    assert [cell for _, cell in everything][::2] == [cell for _, cell in everything][1::2]  # nor on whose cell it is


def test_an_interrupted_evaluation_goes_on(evaluation, report, tmp_path, monkeypatch, capsys):
    """Of ten cells one is lost, one has no picture, one an empty one, one is cut short: these alone are measured, to
    the same end."""
    out, measured = tmp_path / "star", []
    shutil.copytree(evaluation, out)
    cells = sorted((out / "cells").glob("*.json"))
    assert len(cells) == 10
    cells.sort(key=lambda path: not path.with_suffix(".png").exists())  # four have none
    lost = {path.stem for path in cells[:4]}
    cells[0].unlink()
    cells[1].with_suffix(".png").write_bytes(b"")
    cells[2].with_suffix(".png").unlink()
    cells[3].write_text(cells[3].read_text()[:-20])
    (out / "report.json").unlink()

    def remembered(self, pipeline, cell, *rest):
        """What the evaluation measured, until two cells are done."""
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(key(cell))
        line = json.loads((evaluation / "cells" / f"{measured[-1]}.json").read_text())
        assert line["prompts"]  # the cells that are lost have pictures
        pictures = np.asarray(Image.open(evaluation / "cells" / f"{measured[-1]}.png"))
        strip = pictures.reshape(32, -1, 32, 3).swapaxes(0, 1)
        return Measured(line["figures"], line["unet_evaluations"], line["seconds"], strip, line["prompts"])

    monkeypatch.setattr(Bench, "measure", remembered)
    assert main(command(out)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (out / "report.json").exists()
    first = measured[:]
    measured.clear()
    assert main(command(out)) == 0
    assert "8 cells are there already, 2 are to be measured" in capsys.readouterr().err
    assert set(first) | set(measured) == lost and not set(first) & set(measured)
    again = json.loads((out / "report.json").read_text())
    for name in ("figures", "near", "diagnostics", "unet_evaluations", "seconds", "sha256", "pictures"):
        assert [row[name] for row in again["rows"]] == [row[name] for row in report["rows"]]
    for path in (evaluation / "cells").glob("*.png"):
        assert path.read_bytes() == (out / "cells" / path.name).read_bytes()
    # Nothing is left to do, and a baseline of other settings is refused.
    monkeypatch.setattr(Bench, "measure", None)
    assert main(command(out)) == 0
    capsys.readouterr()
    assert "cannot be resumed" in refused(capsys, *command(out)[1:], "--config.seed=5")


def test_a_baseline_of_another_base_is_refused(evaluation, tmp_path, capsys):
    """Also of the base at the same place whose weights have changed since."""
    out = tmp_path / "star"
    shutil.copytree(evaluation, out)
    (path,) = out.glob("baselines/*/manifest.json")
    story = json.loads(path.read_text())
    story["model"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(story))
    assert "uce was erased from another model than world: name another --out" in refused(capsys, *command(out)[1:])


def test_a_models_hash_is_of_all_that_its_pictures_depend_on(tmp_path):
    from tests.run import untrained

    base = untrained.write(tmp_path / "base")
    changes = {
        "vae/config.json": {"scaling_factor": 0.5}, "unet/config.json": {"sample_size": 32},
        "text_encoder/config.json": {"hidden_act": "gelu"}, "tokenizer/tokenizer_config.json": {"model_max_length": 9},
        "scheduler/scheduler_config.json": {"beta_end": 0.02},
    }  # fmt: skip
    found = [model_digest(load_pipeline(base))]
    for name, change in changes.items():
        folder = shutil.copytree(base, tmp_path / name.replace("/", "-"))
        if len(found) == 1:
            assert model_digest(load_pipeline(folder)) == found[0]  # the same somewhere else
        config = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        assert config | change != config
        (folder / name).write_text(json.dumps(config | change))
        found.append(model_digest(load_pipeline(folder)))
    assert len(set(found)) == len(changes) + 1


@given(st.dictionaries(st.integers(0, 99), st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=5))
def test_seeds_are_pooled_by_their_counts(seeds):
    lines = [
        {"cell": {"seed": seed}, "figures": {"plain": {"count": min(pair), "n": max(pair)}}}
        for seed, pair in seeds.items()
    ]
    found = pooled(lines, "plain")
    assert found["count"] == sum(min(pair) for pair in seeds.values())
    assert found["n"] == sum(max(pair) for pair in seeds.values())
    assert len(found["by_seed"]) == len(seeds)
    assert (found["share"] is None) == (found["n"] == 0) == (found["interval"] is None)


def test_means_and_distances_are_pooled_over_seeds_too():
    def lines(*rows):
        return [{"cell": {"seed": k}, "figures": {"x": row}} for k, row in enumerate(rows)]

    means = np.random.default_rng(0).normal(size=60), np.random.default_rng(1).normal(2, 1, 40)
    rows = [{"mean": x.mean(), "standard_error": x.std(ddof=1) / len(x) ** 0.5, "n": len(x)} for x in means]
    found = pooled(lines(*rows), "x")
    assert found["n"] == 100 and found["mean"] == pytest.approx(np.concatenate(means).mean())
    error = np.sqrt(sum(len(x) * x.var(ddof=1) for x in means)) / 100  # of each seed's own mean
    assert found["interval"] == pytest.approx([found["mean"] - 1.96 * error, found["mean"] + 1.96 * error], abs=1e-4)
    found = pooled(lines({"value": 3.0, "n": 8}, {"value": 5.0, "n": 8}), "x")
    assert (found["value"], found["range"], found["n"]) == (4.0, [3.0, 5.0], 8) and len(found["by_seed"]) == 2
    assert pooled(lines({"mean": 1.0, "standard_error": None, "n": 1}), "x")["interval"] is None


def test_what_is_kept_is_measured_by_the_metrics_own_functions(report, evaluation):
    from aegis_jax import judges
    from aegis_jax.evaluation import retention
    from aegis_jax.evaluation.metrics import composition, frechet, similarity

    base, erased = load_pipeline("world"), load_pipeline(evaluation / "baselines" / "uce" / "pipeline")
    row, judged, clip = report["rows"][1], judges.load("world"), similarity.embedder("world")
    for name, share in composition.composition(erased, STAR, judged, n=2, seed=1).items():
        assert (row["figures"][name]["count"], row["figures"][name]["n"]) == (share["count"], share["n"])
    images, prompts = retention.drawn(erased, STAR, n=2, seed=1)
    assert not any(set(prompt.split()) & set(STAR.value.words) for prompt in prompts)
    score = similarity.clip_score(clip.images(images), clip.texts(prompts))
    assert row["figures"]["clip_score"]["mean"] == pytest.approx(score["mean"], abs=1e-5)
    to = retention.references(base, STAR, n=2, seed=1)
    for name, reference in to.items():
        distance = frechet.frechet(judged.features(images), judged.features(reference))
        assert row["figures"][f"frechet_judge_{name}"]["value"] == pytest.approx(distance, rel=1e-3)
    # The renderer's pictures are of what the prompts say.
    assert (judged.answers(judged.probabilities(to["real"])) == judged.answers(judged.probabilities(to["base"]))).all()
    assert list(row["near"]) == list(report["near"]) and row["figures"]["near"]["n"] == 4


def test_distances_of_predictions_tell_the_erased_model_from_the_base(report):
    base, erased = (row["diagnostics"] for row in report["rows"])
    assert list(base) == ["star", "asterisk", *report["near"]]
    for word, found in erased.items():
        assert base[word]["d1"]["value"] == 0 and found["d0"] == base[word]["d0"]  # d0 is the base's own
        assert (found["d0"]["value"] == 0) == (word == "star")
    assert erased["star"]["d1"]["value"] > max(erased[word]["d1"]["value"] for word in report["near"])
    # Where no prompt needs an attack there is nothing to measure one by.
    assert report["rows"][0]["attacks"][ATTACKS]["d2"] is None
    assert report["rows"][1]["attacks"][ATTACKS]["d2"]["value"] > 0


def cell(kind, **more):
    return {"kind": kind, "seed": 0, "images": 2, "cases": 4, "neutral": None} | more


@pytest.fixture(scope="module")
def bench():
    return Bench(Embedded(load_pipeline("world"), "star"))


def result(pipeline, rows: int, **more):
    cond = per_latent(encode(pipeline, "a star"), rows)
    return AttackResult(["a star"] * rows, cond, np.zeros((1, rows)), 7.0, 1.0, **more)


def test_an_attack_by_picture_is_shown_from_the_noise_it_found(bench, monkeypatch):
    base = bench.base

    def tina(pipeline, concept, given, config, progress):
        n = len(given.prompts)
        outcomes = [SUCCEEDED] * (n - 1) + [FAILED]
        return result(pipeline, n, outcomes=outcomes, latents=np.zeros((n, *latent_shape(pipeline)), np.float32))

    monkeypatch.setitem(METHODS, "tina", METHODS["tina"].__class__(tina, METHODS["tina"].config, of="picture"))
    found = bench.measure(base, cell("tina"), METHODS["tina"].config())
    n = len(found.prompts)
    assert found.figures == {"attack_succeeded": {"count": n - 1, "n": n}}  # no prompt, so no d2
    assert found.unet_evaluations == 7 + n * 25  # the attack's, and those of its pictures, without guidance
    assert all((picture == found.pictures[0]).all() for picture in found.pictures)  # of one noise and one prompt


def test_an_attack_by_token_counts_images_of_all_restarts(bench, monkeypatch):
    seen = {}

    def cce(pipeline, concept, given, config, progress):
        seen.update(seed=config.seed, images=len(given.images))
        return result(pipeline, 2, pick=1)

    monkeypatch.setitem(METHODS, "cce", METHODS["cce"].__class__(cce, METHODS["cce"].config))
    monkeypatch.setattr(attacked, "attacker_images", lambda *a, **k: np.zeros((5, 32, 32, 3), np.uint8))
    found = Bench(Embedded(bench.base, "star")).measure(bench.base, cell("cce", seed=2), METHODS["cce"].config())
    assert seen == {"seed": 2, "images": 5}
    assert found.figures["shown"]["n"] == 4 and found.figures["shown"]["count"] >= 3  # the base draws stars
    # The attack's, those of four images and of the cases, and of d2: two latents to the last of 25 timesteps, four
    # predictions each.
    assert found.unet_evaluations == 7 + (4 + len(found.prompts)) * 50 + 2 * (2 * 24 + 4)
    assert found.figures["d2"]["n"] == 2 and found.figures["d2"]["value"] > 0  # "star" against "a star"


def test_levels_are_figures_of_their_own_and_an_attacks_own_pictures_are_shown(bench, monkeypatch):
    method, seen = METHODS["revival"], []

    def revival(pipeline, concept, given, config, progress):
        n = len(given.prompts)
        seen.append(len(given.without.images))
        levels = {"attack": {"0 steps": np.zeros(n, bool), "5 steps": np.arange(n) < 2}}
        outcomes = [SUCCEEDED] * 2 + [FAILED] * (n - 2)
        return result(pipeline, n, outcomes=outcomes, levels=levels, images=np.full((n, 32, 32, 3), 5, np.uint8))

    monkeypatch.setitem(METHODS, "revival", dataclasses.replace(method, run=revival))
    monkeypatch.setattr(cases, "without", lambda *a, **k: Pictures(np.zeros((9, 32, 32, 3), np.uint8), [""] * 9))
    found = Bench(Embedded(bench.base, "star")).measure(bench.base, cell("revival"), method.config())
    n = len(found.prompts)
    assert seen == [9] and (found.pictures == 5).all()
    assert found.figures["attack: 5 steps"] == found.figures["together"] == {"count": 2, "n": n}
    assert found.figures["attack: 0 steps"] == found.figures["no_attack_needed"] == {"count": 0, "n": n}


def test_prompts_are_counted_once_whatever_their_restarts(bench, monkeypatch):
    method = METHODS["unlearndiffatk"]

    def attack(pipeline, concept, given, config, progress):
        n = len(given.prompts)
        outcomes = [NOT_NEEDED, NOT_NEEDED, FAILED, SUCCEEDED] + [FAILED] * (2 * n - 4)
        return result(pipeline, 2 * n, outcomes=outcomes)

    monkeypatch.setitem(METHODS, "unlearndiffatk", method.__class__(attack, method.config, of="prompt"))
    found = bench.measure(bench.base, cell("unlearndiffatk"), method.config(restarts=2))
    n = len(found.prompts)
    assert found.figures.pop("d2")["n"] == 2 * 2  # latents of two prompts
    assert n > 2 and found.figures == {
        "no_attack_needed": {"count": 1, "n": n},
        "attack_succeeded": {"count": 1, "n": n - 1},
        "together": {"count": 2, "n": n},
    }
