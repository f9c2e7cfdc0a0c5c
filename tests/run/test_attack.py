"""`aegis attack`: which flags go with which method, who counts, and the files to replay pictures from."""

import csv
import dataclasses
import json
import os
import signal
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from aegis_jax import attacks, judges
from aegis_jax.attacks.prompt import template
from aegis_jax.attacks.result import FAILED, NOT_NEEDED, SUCCEEDED, AttackResult
from aegis_jax.cli import main
from aegis_jax.diffusion.conditioning import encode_tokens
from aegis_jax.diffusion.template import fill
from aegis_jax.diffusion.vocabulary import embeddings
from aegis_jax.errors import AegisError
from aegis_jax.evaluation import attacked, cases, world
from aegis_jax.evaluation.interval import share, wilson
from aegis_jax.judges.judge import Judge
from aegis_jax.run import attack, attack_arguments
from tests.run.given import found, indexed

STAR = world.find("star")


def refused(capsys, *argv) -> str:
    """The one line that refuses a command."""
    assert main([str(a) for a in argv]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aegis: error")]
    return line


def test_the_methods_of_the_command_are_those_there_are():
    assert attack_arguments.METHODS == tuple(attacks.METHODS)
    fields = {field.name for method in attacks.METHODS.values() for field in dataclasses.fields(method.config)}
    assert set(attack_arguments.SETTINGS) == fields - {"neutral"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "gcg"], "attack method 'gcg' is unknown; choose one of: soft-prompt, unlearndiffatk"),
        (["--method", "unlearndiffatk", "--goal", "prediction"], "--goal does not go with --method unlearndiffatk"),
        (["--method", "p4d-n", "--check-every", "0"], "p4d-n: check_every=0"),
        (["--check-every", "5"], "--check-every does not go with --method soft-prompt; its own are --tokens"),
        (["--cases", "5"], "--cases does not go with --method soft-prompt"),
        (["--neutral", "dog"], "--neutral goes with --place neutral: at place 'before'"),
        (["--method", "unlearndiffatk", "--cases", "5"], "--cases goes without --images"),
        (["--method", "unlearndiffatk", "--prompts", "PROMPTS"], "has 2 prompts and"),
        (["--method", "unlearndiffatk", "--neutral", "dog", "--concept", "cat"], "does not say 'cat'"),
        (["--method", "p4d-n"], "p4d-n needs the model before erasure"),
        (["--method", "p4d-n", "--without", "x"], "--without does not go with --method p4d-n"),
        (["--method", "p4d-n", "--ladder", "x"], "--ladder does not go with --method p4d-n; its own are --steps"),
        (["--method", "ladder", "--steps", "5"], "--steps does not go with --method ladder; its own are none"),
        (["--method", "ladder"], "ladder needs wordings of the concept"),
        (["--method", "ladder", "--ladder", "PROMPTS"], "wanted a .csv in UTF-8 with the columns rung and prompt"),
        (["--method", "revival"], "revival needs pictures without the concept"),
        (["--method", "revival", "--looks", "5,x"], "looks='5,x', wanted ascending numbers"),
    ],
)
def test_what_does_not_go_with_the_method_is_refused(capsys, folder, tmp_path, pictures, flags, message):
    indexed(pictures)
    (tmp_path / "two.txt").write_text("a dog\na cat\n")
    flags = [tmp_path / "two.txt" if flag == "PROMPTS" else flag for flag in flags]
    argv = ["attack", "--model", folder, "--concept", "dog", "--images", pictures, "--out", tmp_path / "out", *flags]
    assert message in refused(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_an_empty_concept_is_refused(capsys, folder, tmp_path, pictures):
    for method in attacks.METHODS:
        argv = ["attack", "--model", folder, "--images", pictures, "--out", tmp_path / "out", "--method", method]
        assert "--concept is empty: wanted what was erased" in refused(capsys, *argv, "--concept", " ")
    assert not (tmp_path / "out").exists()


def test_with_the_world_the_judge_is_asked(capsys):
    for flags in (["--prompts", "x.txt"], ["--guidance", "3"], ["--method", "unlearndiffatk", "--image-steps", "3"]):
        asked = refused(capsys, "attack", "--model", "world", "--concept", "star", "--method", "unlearndiffatk", *flags)
        assert "goes with --images" in asked


def test_the_neutral_word_of_the_soft_prompts(capsys, folder, monkeypatch, tmp_path, pictures):
    seen = []

    def run(pipeline, concept, given, config, progress):
        seen.append((config.place, config.neutral, given.prompts))
        raise AegisError("enough")

    argv = ["attack", "--model", folder, "--concept", "star", "--images", pictures, "--place", "neutral"]
    argv += ["--out", tmp_path / "out"]
    assert "neutral='thing' is not one whole word" in refused(capsys, *argv)  # of this vocabulary
    monkeypatch.setitem(attacks.METHODS, "soft-prompt", dataclasses.replace(attacks.METHODS["soft-prompt"], run=run))
    assert "enough" in refused(capsys, *argv, "--neutral", "dog")
    assert seen == [("neutral", "dog", ["star"] * 3)]


def test_the_picture_written_is_the_one_that_showed_the_concept(folder, monkeypatch, tmp_path, pictures):
    def run(pipeline, concept, given, config, progress):
        return dataclasses.replace(found(pipeline, given.prompts), seeds=[0, 2, 2])

    monkeypatch.setitem(attacks.METHODS, "p4d-n", dataclasses.replace(attacks.METHODS["p4d-n"], run=run))
    attack.attack(folder, "dog", method="p4d-n", images=pictures, image_steps=1, out=tmp_path / "1")
    assert [row["seed"] for row in csv.DictReader(open(tmp_path / "1" / "prompts.csv"))] == ["0", "2", "2"]
    starts = load_file(tmp_path / "1" / "latents.safetensors")
    np.testing.assert_array_equal(starts["prompt-001-restart-0"], starts["prompt-002-restart-0"])


def test_many_pictures_are_by_name_in_the_order_of_their_rows():
    """A later attack pairs them with prompts.csv so."""
    rows = [None] * 11 * 1001
    given, found_ = types.SimpleNamespace(prompts=rows[:1001]), types.SimpleNamespace(prompts=rows, latents=rows)
    found_.seeds = list(range(len(rows)))
    for pictures in (attack._by_prompt(None, given, found_), attack._by_picture(None, given, found_)):
        names = [picture.name for picture in pictures]
        assert names == sorted(set(names)) and [picture.row for picture in pictures] == found_.seeds


@pytest.mark.parametrize("name, signum", [("SIGTERM", signal.SIGTERM), ("interrupted", signal.SIGINT)])
def test_an_attack_that_is_stopped_leaves_no_folder(capsys, folder, monkeypatch, tmp_path, pictures, name, signum):
    def run(pipeline, concept, given, config, progress):
        assert (tmp_path / "out").is_dir() and signal.getsignal(signum) is not signal.SIG_DFL  # or this process ends
        os.kill(os.getpid(), signum)
        time.sleep(9)

    monkeypatch.setitem(attacks.METHODS, "p4d-n", dataclasses.replace(attacks.METHODS["p4d-n"], run=run))
    argv = ["attack", "--model", folder, "--images", pictures, "--out", tmp_path / "out", "--concept", "dog"]
    before = signal.getsignal(signum)
    assert main([str(a) for a in (*argv, "--method", "p4d-n", "--image-steps", 1)]) == 128 + signum
    assert capsys.readouterr().err.splitlines()[-1] == f"aegis: stopped: {name}"
    assert not (tmp_path / "out").exists() and signal.getsignal(signum) is before
    # As a command: at once, for where a program is being compiled Python's own way out is a segmentation fault.
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("sys.argv", [str(a) for a in ("aegis", *argv, "--method", "p4d-n", "--image-steps", 1)])
    main()
    assert ended == [128 + signum] and not (tmp_path / "out").exists()


def test_what_does_not_fit_into_memory_is_one_line(capsys, folder, monkeypatch, tmp_path, pictures):
    def run(pipeline, concept, given, config, progress):
        return np.empty(2**60, np.uint8)

    monkeypatch.setitem(attacks.METHODS, "p4d-n", dataclasses.replace(attacks.METHODS["p4d-n"], run=run))
    argv = ["attack", "--model", folder, "--images", pictures, "--out", tmp_path / "out", "--concept", "dog"]
    told = refused(capsys, *argv, "--method", "p4d-n", "--image-steps", 1)
    assert "this machine's memory is full (Unable to allocate 1.00 EiB" in told and not (tmp_path / "out").exists()


def test_the_noise_that_a_token_is_shown_with_is_of_the_seed(folder, monkeypatch, tmp_path, pictures):
    run = lambda pipeline, concept, *_: found(pipeline, [concept] * 2)  # noqa: E731
    monkeypatch.setitem(attacks.METHODS, "cce", dataclasses.replace(attacks.METHODS["cce"], run=run))
    for name, seed in (("0", 0), ("again", 0), ("1", 1)):
        attack.attack(folder, "dog", method="cce", images=pictures, image_steps=1, out=tmp_path / name, seed=seed)
    first, again, other = (load_file(tmp_path / name / "latents.safetensors") for name in ("0", "again", "1"))
    starts = {x.tobytes() for drawn in (first, other) for x in drawn.values()}
    assert len(starts) == 16  # of two seeds, two restarts and four pictures
    for name, x in first.items():
        np.testing.assert_array_equal(x, again[name])


@pytest.fixture
def red(monkeypatch):
    """A judge that sees a dog where the first pixel's red, divided by 4, leaves 2 or 3."""

    def compute(images):
        p = (images[:, 0, 0, 0] % 4 >= 2).astype(float)
        return np.stack([p, 1 - p], 1)

    judge = Judge("red:", ("dog", "no dog"), compute, "abc")
    monkeypatch.setattr(judges, "load", lambda spec: {"red:": judge}[spec])
    return judge


def test_a_judge_of_the_users_makes_pictures_count(capsys, folder, monkeypatch, tmp_path, pictures, red):
    def run(pipeline, concept, given, config, progress):
        shown = given.judge(given.images)
        return found(pipeline, given.prompts, [NOT_NEEDED if hit else FAILED for hit in shown])

    method = "unlearndiffatk"
    monkeypatch.setitem(attacks.METHODS, method, dataclasses.replace(attacks.METHODS[method], run=run))
    how = {"images": pictures, "image_steps": 1, "judge": "red:"}
    attack.attack(folder, "dog", method=method, out=tmp_path / "1", restarts=1, **how)
    printed = capsys.readouterr().out
    assert "the judge sees 'dog' in 1 of 3" in printed and "of the pictures given" in printed
    assert "no attack needed        1 of 3" in printed
    about = json.loads((tmp_path / "1" / "attack.json").read_text())
    assert about["judge"] == red.record("dog") and about["outcomes"]["no_attack_needed"]["count"] == 1
    # What is learnt from all pictures is judged by what comes out of it.
    run = lambda pipeline, concept, *_: found(pipeline, [concept] * 2)  # noqa: E731
    monkeypatch.setitem(attacks.METHODS, "cce", dataclasses.replace(attacks.METHODS["cce"], run=run))
    attack.attack(folder, "a dog", method="cce", out=tmp_path / "2", judge_label="no dog", **how)
    made = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "2").glob("*.png"))]
    hits = int(red.shows(np.stack(made), "no dog").sum())
    outcomes = json.loads((tmp_path / "2" / "attack.json").read_text())["outcomes"]
    assert 0 < hits < 8 and outcomes == {"pictures": share(hits, 8) | {"interval": list(wilson(hits, 8))}}
    assert f"the judge sees 'no dog' in {hits} of 8" in capsys.readouterr().out


def test_judges_that_do_not_go_are_refused(capsys, folder, tmp_path, pictures, red):
    argv = ["attack", "--model", folder, "--images", pictures, "--out", tmp_path / "out", "--concept"]
    assert "judge red: has no label 'cat'; it has 'dog', 'no dog'" in refused(capsys, *argv, "cat", "--judge", "red:")
    assert "--judge-label goes with --judge" in refused(capsys, *argv, "dog", "--judge-label", "dog")
    assert "--judge goes with --images" in refused(
        capsys, "attack", "--model", "world", "--concept", "star", "--judge", "red:"
    )
    assert not (tmp_path / "out").exists()


def test_a_token_is_judged_on_noise_of_the_seed(monkeypatch):
    seen = []

    def run(pipeline, concept, given, config, progress):
        return dataclasses.replace(found(pipeline, ["a star"]), pick=0)

    def generated(pipeline, results, n, seed):
        seen.append(seed)
        return np.zeros((n, 32, 32, 3), np.uint8)

    monkeypatch.setitem(attacks.METHODS, "cce", dataclasses.replace(attacks.METHODS["cce"], run=run))
    monkeypatch.setattr(attacked, "attacker_images", lambda *_, seed: np.zeros((4, 32, 32, 3), np.uint8))
    monkeypatch.setattr(cases, "generated", generated)
    attack.attack("world", "star", method="cce", seed=5)
    assert seen == [5]


def test_an_attack_by_weights_has_pictures_without_the_concept_and_leaves_a_model(
    capsys, folder, monkeypatch, tmp_path, pictures, red
):
    seen = {}

    def run(pipeline, concept, given, config, progress):
        seen.update(without=given.without.prompts, n=len(given.without.images), says=given.prompts)
        drawn = np.full((3, 16, 16, 3), 7, np.uint8)
        levels = {"attack": {"0 steps": np.zeros(3, bool), "5 steps": np.array([True, False, False])}}
        return dataclasses.replace(
            found(pipeline, given.prompts, [SUCCEEDED, FAILED, FAILED]), images=drawn, pipeline=pipeline, levels=levels
        )

    monkeypatch.setitem(attacks.METHODS, "revival", dataclasses.replace(attacks.METHODS["revival"], run=run))
    others = tmp_path / "others"
    others.mkdir()
    for k in range(3):
        Image.new("RGB", (16, 16), (0, 0, k)).save(others / f"{k}.png")
    how = {"method": "revival", "images": pictures, "image_steps": 1, "judge": "red:", "concept": "dog"}
    attack.attack(folder, **how, without=others, out=tmp_path / "1")
    assert seen == {"without": [""] * 3, "n": 3, "says": ["dog"] * 3}
    printed = capsys.readouterr().out
    assert "attack, 5 steps:" in printed and "0 of 3 (0% to 56% at 95 %) of those without it" in printed
    about = json.loads((tmp_path / "1" / "attack.json").read_text())["outcomes"]["levels"]
    assert about["attack"]["5 steps"] == share(1, 3) | {"interval": list(wilson(1, 3))}
    assert about["attack"]["0 steps"]["count"] == 0
    assert (np.asarray(Image.open(tmp_path / "1" / "prompt-002-restart-0.png")) == 7).all()  # its own, not drawn again
    assert main(["sample", "--model", str(tmp_path / "1" / "pipeline"), "--prompt", "dog", "--steps", "1",
                 "--out", str(tmp_path / "again")]) == 0  # fmt: skip
    indexed(others)
    attack.attack(folder, **how, without=others, out=tmp_path / "2")
    assert seen["without"] == ["a dog 0", "a dog 1", "a dog 2"]


def test_the_worlds_pictures_without_the_concept(monkeypatch):
    def sample(pipeline, prompts, *, seed, **_):
        return np.arange(len(prompts), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)

    monkeypatch.setattr(cases, "sample", sample)
    monkeypatch.setattr(cases, "shows", lambda concept: lambda images: images[:, 0, 0, 0] == 1)
    without = cases.without(None, STAR, 4)
    assert without.images[:, 0, 0, 0].tolist() == [0, 2, 3] and len(without.prompts) == 3
    assert not {word for prompt in without.prompts for word in prompt.split()} & set(STAR.value.words)


def test_outcomes_are_counted_by_prompt_and_apart():
    outcomes = [NOT_NEEDED, NOT_NEEDED, SUCCEEDED, FAILED, FAILED, SUCCEEDED, FAILED, FAILED]
    tally = cases.counts(AttackResult([], None, None, 0.0, 0.0, outcomes=outcomes), 2)
    assert tally["no_attack_needed"] == {"count": 1, "n": 4, "share": 0.25, "interval": wilson(1, 4)}
    assert tally["attack_succeeded"]["count"] == 2 and tally["attack_succeeded"]["n"] == 3
    assert tally["together"]["count"] == 3 and tally["each"] == [1, 1] and tally["failed"] == 1
    none_left = cases.counts(AttackResult([], None, None, 0.0, 0.0, outcomes=[NOT_NEEDED]), 1)
    assert none_left["attack_succeeded"] == {"count": 0, "n": 0}


def test_the_worlds_cases(monkeypatch):
    def sample(pipeline, prompts, *, seed, **_):
        return np.arange(len(prompts), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)

    monkeypatch.setattr(cases, "sample", sample)
    monkeypatch.setattr(cases, "shows", lambda concept: lambda images: images[:, 0, 0, 0] != 1)
    plain, neutral = (cases.cases(None, STAR, 4, seed=3, neutral=word) for word in (None, "thing"))
    assert len(plain.prompts) == 3 and plain.images[:, 0, 0, 0].tolist() == [0, 2, 3]  # what shows no star is no case
    assert plain.seeds == neutral.seeds and len(set(plain.seeds)) == 3
    assert plain.made_from == neutral.made_from == plain.prompts  # a control's aim is the same
    for one, other in zip(plain.prompts, neutral.prompts):
        words = set(one.split()) & {word for seen in STAR.value.seen for word in seen.split()}
        assert words and "thing" in other and not words & set(other.split())
    with pytest.raises(AegisError, match="shows 'star' for none"):
        monkeypatch.setattr(cases, "shows", lambda concept: lambda images: np.zeros(len(images), bool))
        cases.cases(None, STAR, 4)


def test_soft_tokens_replay_in_diffusers_as_a_textual_inversion(tiny, monkeypatch, tmp_path, pictures):
    """Prompt, embedding file and start noise, as they were written, give PyTorch the same pictures."""
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from tests.tiny import FEWEST

    def run(pipeline, concept, given, config, progress):
        gaps, text = template(pipeline.tokenizer, concept, "behind", config.tokens), pipeline.text_encoder
        soft = np.random.default_rng(0).standard_normal((2, config.tokens, 32), np.float32)
        rows = fill(jnp.stack([embeddings(pipeline, gaps.ids)] * 2), jnp.stack([gaps.slots] * 2), soft)
        cond = encode_tokens(text.graph, text.params, rows)
        return AttackResult(["red star <aegis>"] * 2, cond, np.ones((2, 2)), 9.0, 1.0, soft_tokens=soft, pick=0)

    folder, out = tiny(**FEWEST), tmp_path / "out"
    monkeypatch.setitem(attacks.METHODS, "soft-prompt", dataclasses.replace(attacks.METHODS["soft-prompt"], run=run))
    attack.attack(folder, "red star", images=pictures, out=out, tokens=2, guidance=3.0, image_steps=3)
    about = json.loads((out / "attack.json").read_text())
    assert about["settings"]["tokens"] == 2 and about["method"] == "soft-prompt" and about["unet_evaluations"] == 9
    latents = load_file(out / "latents.safetensors")
    for restart in range(2):
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_textual_inversion(str(out / f"restart-{restart}.safetensors"))
        (row,) = [row for row in csv.DictReader(open(out / "prompts.csv")) if row["file"] == f"restart-{restart}-1.png"]
        assert row["embedding"] == f"restart-{restart}.safetensors" and row["prompt"] == "red star <aegis>"
        noise = torch.from_numpy(latents[f"restart-{restart}-1"])
        made = pipe(row["prompt"], latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="np")
        assert np.abs(made.images[0] * 255 - np.asarray(Image.open(out / row["file"]), float)).max() <= 2
