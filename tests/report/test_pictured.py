"""`aegis evaluate` of a base that is not the world: a small untrained folder, a plug-in judge, the user's prompts."""

import dataclasses
import json
import shlex
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aegis_jax import judges
from aegis_jax.cli import main
from aegis_jax.diffusion.sample import sample
from aegis_jax.errors import AegisError
from aegis_jax.evaluation.metrics import frechet, neighbours, similarity
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.report import asked
from aegis_jax.report.asked import OPTIONS, Asked
from aegis_jax.report.pictured import Pictured
from aegis_jax.run.judging import Question
from aegis_jax.run.prompts import Prompt, PromptSet
from tests.report import tiny_judge
from tests.report.test_evaluate import planned, refused
from tests.report.test_page import Page
from tests.run import untrained
from tests.run.conftest import compilation_cache  # noqa: F401
from tests.tiny_clip import tiny_clip

# Two rows of three bring a guidance.
PROMPTS = "prompt,seed,guidance\na Church,7,2\nthe church on a red sky,8,\na church of <b>stars</b>,9,2\n"
ATTACK = "ring-a-bell-embedding"
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def plug_in():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judges.KINDS, "tiny", tiny_judge.__name__)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the user brings."""
    folder = tmp_path_factory.mktemp("brought")
    untrained.write(folder / "base")
    untrained.write(folder / "erased", seed=1)
    tiny_clip(folder / "clip")
    (folder / "prompts.csv").write_text(PROMPTS)
    (folder / "neutral.txt").write_text("a dog\na cat on a circle\n\nthe sky\n")
    (folder / "real").mkdir()
    for k in range(3):
        grain = np.random.default_rng(k).integers(0, 256, (20, 16, 3))
        Image.fromarray(grain.astype(np.uint8)).save(folder / "real" / f"{k}.png")
    return folder


def command(files, out, *more, leave=()):
    options = {
        "--base": files / "base", "--concept": "church", "--judge": "tiny:", "--prompts": files / "prompts.csv",
        "--retain": files / "neutral.txt", "--real": files / "real", "--clip": files / "clip", "--beside": "sky",
        "--attacks": ATTACK, "--baselines": "uce", "--attack.ring-a-bell-embedding.eta": 2.5,
        "--seeds": "0,1", "--images": 4, "--image-steps": STEPS, "--guidance": 3, "--out": out,
    }  # fmt: skip
    given = [f"{k}={v}" if "." in k else (k, str(v)) for k, v in options.items() if k not in leave]
    flat = [part for pair in given for part in ([pair] if isinstance(pair, str) else pair)]
    return ["evaluate", *([] if "model" in leave else [str(files / "erased")]), *flat, *map(str, more)]


@pytest.fixture(scope="module")
def evaluation(files, tmp_path_factory, compilation_cache):  # noqa: F811
    out = tmp_path_factory.mktemp("evaluation") / "church"
    assert main(command(files, out)) == 0
    return out


@pytest.fixture(scope="module")
def report(evaluation):
    return json.loads((evaluation / "report.json").read_text())


def test_prompts_bring_their_own_seed_and_guidance(files, report):
    """Plain prompts of both seeds by hand: a row that brings a guidance is sampled with it, its seed counts on."""
    pipeline, shown = load_pipeline(files / "erased"), []
    for seed in (0, 1):
        rows = [("a Church", 7, 2), ("the church on a red sky", 8, 3), ("a church of <b>stars</b>", 9, 2)]
        rows.append(("a Church", 7 + 100_003, 2))  # four images of three rows
        for text, own, guidance in rows:
            image = sample(pipeline, text, seed=[own + 1_000_000 * seed], steps=STEPS, guidance=guidance)
            shown.append(tiny_judge.bands(image)[0].argmax() == 0)
    found = report["rows"][1]["figures"]["plain"]
    assert (found["count"], found["n"]) == (sum(shown), 8) and 0 < sum(shown) < 8


def test_rows_have_attacks_controls_and_intervals(report):
    roles = [(row["name"], row["role"]) for row in report["rows"]]
    assert roles == [("base", "base"), ("erased", "model"), ("uce", "baseline")]
    assert report["neutral"] == "thing" and report["judge"]["label"] == tiny_judge.LABELS[0]
    for row in report["rows"]:
        attack = row["attacks"][ATTACK]
        assert 0 < attack["no_attack_needed"]["n"] == attack["control"]["together"]["n"] <= 6
        assert attack["no_attack_needed"]["n"] == attack["no_attack_needed"]["count"] + attack["attack_succeeded"]["n"]
        low, high = attack["rate"]["interval"]
        assert 0 <= low <= attack["rate"]["share"] <= high + 1e-9 and set(attack["rate"]["by_seed"]) == {"0", "1"}
        assert row["worst"] == row["worst_of_all"] and row["worst"]["rate"] == attack["rate"]
        assert attack["control"]["word"] == "thing"
        assert (attack["d2"] is None) == (attack["attack_succeeded"]["n"] == 0)  # no prompt needed an attack
        assert attack["d2"] is None or attack["d2"]["value"] > 0
    assert report["rows"][1]["attacks"][ATTACK]["d2"] is not None
    assert report["rows"][2]["method"] == "uce" and "--config" not in report["rows"][2]["erase_command"].split()
    # Cases are those which the base shows: there no prompt needs an attack.
    assert report["rows"][0]["attacks"][ATTACK]["no_attack_needed"]["share"] == 1


def test_what_is_kept_of_neutral_prompts(files, report):
    """Of the second seed: images of three prompts, against the base's second draw and their texts."""
    base, erased = load_pipeline(files / "base"), load_pipeline(files / "erased")
    texts, clip = ["a dog", "a cat on a circle", "the sky"], similarity.embedder(files / "clip")
    draw = lambda model, shift: sample(  # noqa: E731
        model, texts, seed=[k + 1_000_000 + shift for k in range(3)], steps=STEPS, guidance=3
    )
    images, second, figures = draw(erased, 0), draw(base, 50_021), report["rows"][1]["figures"]
    for ruler, of in {"judge": tiny_judge.bands, "clip": clip.features}.items():
        found = figures[f"frechet_{ruler}_base"]
        assert found["by_seed"]["1"]["value"] == pytest.approx(frechet.frechet(of(images), of(second)), rel=1e-2)
        assert found["n"] == 3 and f"frechet_{ruler}_real" in figures
    wanted = similarity.clip_score(clip.images(images), clip.texts(texts))
    assert figures["clip_score"]["by_seed"]["1"]["mean"] == pytest.approx(wanted["mean"], abs=1e-3)
    assert figures["clip_score"]["n"] == 6 and figures["beside"]["n"] == 8
    assert report["retain"]["prompts"] == 3 and report["real"]["pictures"] == 3


def test_near_concepts_are_the_judges_other_labels(report):
    assert report["near"] and set(report["near"]) == {"dog", "cat"} == set(report["rows"][0]["near"])
    for row in report["rows"]:
        assert row["figures"]["near"]["n"] == sum(share["n"] for share in row["near"].values()) == 8
        assert list(row["diagnostics"]) == ["church", *report["near"]]


def test_the_page_is_whole_and_blurred(evaluation, report):
    found = Page((evaluation / "report.html").read_text())
    assert found.open == [] and "a church of <b>stars</b>" in found.text
    assert "4 latents a seed" in found.text and "3 images a seed" in found.text
    assert "kept (near words)" in found.text and "UnlearnCanvas" not in found.text
    assert "CARE" in found.text and "to real images" in found.text and report["prompts"]["sha256"] in found.text
    assert "blur(" in (evaluation / "report.html").read_text()


def test_a_figures_command_asks_for_its_cells(files, evaluation, report):
    everything = planned(command(files, evaluation))
    for row in report["rows"]:
        for name, attack in row["attacks"].items():
            cells = planned(shlex.split(attack["command"])[1:])
            mine = [cell for cell in everything if cell[0] == row["name"] and json.loads(cell[1])["kind"] == name]
            assert mine and set(mine) <= set(cells) <= set(everything)


def test_other_near_words_measure_no_attack_anew(files, evaluation, report):
    usual, other = ({c for _, c in planned(command(files, evaluation, *more))} for more in ((), ("--near", "cat")))
    assert {json.loads(cell)["kind"] for cell in usual - other} == {"retention", "diagnostics"}


def test_attacks_on_pictures_without_the_concept_depend_on_the_prompts_of_these():
    subject = Pictured.__new__(Pictured)
    subject.__dict__["_about"] = dict.fromkeys(("judge", "prompts", "guidance", "steps", "clip"), "x") | {
        "near": [], "beside": None, "real": None, "retain": {"sha256": "of coco.csv", "file": "coco.csv"},
    }  # fmt: skip
    given = [subject.record(kind).get("retain") for kind in ("recall", "revival", "retention", "cce", "plain")]
    assert given == [{"sha256": "of coco.csv"}] * 3 + [None] * 2


@pytest.mark.parametrize(
    ("leave", "more", "parts"),
    [
        (["--judge"], [], ["not an embedded world", "give --judge"]),
        (["--prompts"], [], ["give --prompts"]),
        ([], ["--judge", "yolo:"], ["'yolo' is unknown", "nudenet"]),
        ([], ["--judge", "world", "--label", "star"], ["16x16", "32x32"]),
        ([], ["--label", "bird"], ["no label 'bird'"]),
        ([], ["--near", "dog,bird"], ["no label 'bird'"]),
        ([], ["--near", "church"], ["counts as the concept"]),
        (["--retain"], [], ["--real goes with --retain"]),
        (["--clip"], [], ["--beside goes with --clip"]),
        ([], ["--image-steps", "0"], ["steps"]),
        ([], ["--prompts", "missing.csv"], ["missing.csv"]),
        ([], ["--real", "."], ["holds no"]),
        (["--attack.ring-a-bell-embedding.eta"], ["--attacks", "cce"], ["initial='object'", "not one token"]),
        ([], ["--concept", " ", "--label", "church"], ["--concept is empty"]),
        ([], ["--concept", "nudity", "--label", "church", "--neutral", "thing"], ["a prompt does not say 'nudity'"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_before_anything_starts(files, capsys, tmp_path, monkeypatch, leave, more, parts):
    monkeypatch.chdir(tmp_path)
    leave = [*leave, *[name for name in more if name.startswith("--")]]
    line = refused(capsys, *command(files, tmp_path / "out", *more, leave=leave)[1:])
    assert all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())


def brought(judge, **more):
    prompts = PromptSet(Path("p.csv"), [Prompt("a church"), Prompt("the church")], {}, "0")
    return Asked(Question(judge, judge.labels[0]), prompts, **more)


def test_words_that_mean_one_label_are_one_near_word(files):
    options = dict.fromkeys(OPTIONS) | {"judge": "tiny:", "prompts": files / "prompts.csv"}
    assert asked.asked("church", "Dog,dog, DOG ,cat", options).near == ("Dog", "cat")


def test_the_word_that_stands_for_all_of_them_is_no_near_word(monkeypatch):
    monkeypatch.setattr(asked, "plan", lambda *_: None)
    monkeypatch.setattr(neighbours, "near", lambda base, text, words, count: [(word, 0.0) for word in words])
    judge = dataclasses.replace(tiny_judge.load("", {}), labels=("church", "All", "dog", "cat"), groups=())
    judge = dataclasses.replace(judge, compute=lambda images: np.full((len(images), 4), 0.25))
    subject = types.SimpleNamespace(asked=brought(judge), _judge=judge, base=None, text="church", _is_label=bool)
    assert Pictured.near.func(subject) == ("dog", "cat")
    with pytest.raises(AegisError, match="--near 'all' stands for all near words together"):
        asked.check(None, brought(judge, near=("all",)), (6, 6))


def test_a_judge_with_one_word_besides_the_concept_has_no_near_words():
    """As one with two labels: there is nothing to choose from."""
    judge = dataclasses.replace(tiny_judge.load("", {}), labels=("church", "Church, old", "dog"), groups=())
    subject = types.SimpleNamespace(asked=brought(judge), _judge=judge, base=None, text="church")
    assert Pictured.near.func(subject) == ()


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (lambda images: np.zeros((1, 3)), r"gave features \(1, 3\) for 2 images"),
        (lambda images: np.zeros(len(images)), r"gave features \(2,\) for 2 images"),
        (lambda images: np.full((len(images), 3), np.nan), "wanted finite numbers"),
        (lambda images: [["a"]] * len(images), "gave as features no array of numbers"),
    ],
)
def test_features_that_cannot_be_are_told_before_anything_starts(monkeypatch, features, said):
    monkeypatch.setattr(asked, "plan", lambda *_: None)
    judge = dataclasses.replace(tiny_judge.load("", {}), features=features)
    given = brought(judge)
    asked.check(None, given, (6, 6))  # without --retain nothing asks for them
    with pytest.raises(AegisError, match=f"judge tiny: .*{said}"):
        asked.check(None, dataclasses.replace(given, retain=given.prompts), (6, 6))


def test_features_are_counted_whenever_they_are_asked_for():
    judge = dataclasses.replace(tiny_judge.load("", {}), features=lambda images: np.zeros((2, 3)))
    features = asked.rulers(brought(judge))["judge"]
    images = np.zeros((3, 6, 6, 3), np.uint8)
    assert features(images[:2]).shape == (2, 3)
    with pytest.raises(AegisError, match=r"gave features \(2, 3\) for 3 images"):
        features(images)


def test_a_base_that_shows_nothing_is_told_before_a_baseline_is_erased(files, capsys, tmp_path):
    pipeline = load_pipeline(files / "base")
    (seed,) = [
        seed for seed in range(20)
        if tiny_judge.bands(sample(pipeline, "a church", seed=[seed], steps=STEPS, guidance=3)).argmax() != 0
    ][:1]  # fmt: skip
    (tmp_path / "prompts.csv").write_text(f"prompt,seed\na church,{seed}\n")
    out, given = tmp_path / "out", ["--prompts", tmp_path / "prompts.csv", "--seeds", "0"]
    line = refused(capsys, *command(files, out, *given, leave=["--prompts", "--seeds"])[1:])
    assert "in none of the base's 1 images" in line and not (out / "baselines").exists()


def test_a_prompt_of_a_guidance_of_its_own_has_another_prompts_picture():
    """For RECALL: of all cases together, though they are attacked by guidance."""
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    rows = types.SimpleNamespace(prompts=[None] * 3)
    subject = types.SimpleNamespace(
        asked=types.SimpleNamespace(prompts=rows), base=None, steps=STEPS, _similarity=None,
        _rows=lambda n, seed: (["a", "b", "c"], [0, 1, 2], [2.0, 3.0, 2.0]),
        _sampled=lambda *_: images, shown=lambda pictures: np.ones(len(pictures), bool),
    )  # fmt: skip
    first, second = Pictured._cases(subject, 3, 0, None)
    assert (first.prompts, second.prompts) == (["a", "c"], ["b"])
    assert first.beside[:, 0, 0, 0].tolist() == [1, 0] and second.beside[:, 0, 0, 0].tolist() == [2]
    rows.prompts = [None]
    subject._rows = lambda n, seed: (["a"], [0], [2.0])
    subject._sampled = lambda *_: images[:1]
    assert Pictured._cases(subject, 1, 0, None)[0].beside is None
