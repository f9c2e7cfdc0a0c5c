"""`aegis attack`: what it needs beside a model, and what it is given."""

import dataclasses

import numpy as np
import pytest

from aegis_jax.attacks import METHODS
from aegis_jax.attacks.result import AttackResult
from aegis_jax.cli import main
from aegis_jax.diffusion.conditioning import Conditioning
from tests.cli.told import picture_of, refused


def test_attack_needs_pictures(capsys, folder, tmp_path):
    attack = ("attack", "--model", folder, "--concept", "dog", "--out", tmp_path / "out")
    assert "no --images" in refused(capsys, *attack)
    (tmp_path / "empty").mkdir()
    assert "no .png" in refused(capsys, *attack, "--images", tmp_path / "empty")
    whole = picture_of(tmp_path).joinpath("0.png").read_bytes()
    for broken in (b"no picture", whole[:20], whole[:16] + b"\xff" * 8 + whole[24:]):
        (tmp_path / "empty" / "a.png").write_bytes(broken)
        assert "a.png" in refused(capsys, *attack, "--images", tmp_path / "empty")
    for option, value in (("--out", tmp_path / "out"), ("--guidance", 3), ("--image-steps", 25)):
        judged = refused(capsys, "attack", "--model", "world", "--concept", "star", option, value)
        assert f"{option} goes with --images" in judged
    assert main(["attack", "--model", "world", "--concept", "star", "--seed", "-1"]) == 2
    assert "seed=-1" in capsys.readouterr().err.splitlines()[-1]
    argv = (*attack, "--images", picture_of(tmp_path), "--tokens", "99")
    assert main([str(a) for a in argv]) == 2
    assert "99 learnt tokens exceed" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "model, given, wanted",
    [
        ("tiny", [], {"guidance": 7.5, "steps": 50}),
        ("tiny", ["--guidance", "2", "--image-steps", "9"], {"guidance": 2.0, "steps": 9}),
        ("world", [], {"guidance": 3.0, "steps": 25}),
    ],
)
def test_an_attacks_pictures_are_sampled_as_its_model_is(monkeypatch, folder, tmp_path, model, given, wanted):
    from aegis_jax.evaluation import attacked

    seen = []

    def found(pipeline, concept, given, config, progress):
        seen.append((given.images.shape, given.original is not None, config.place))
        cond = Conditioning(np.zeros((1, 4, 8), np.float32))
        return AttackResult(["<aegis>"], cond, np.ones((2, 1)), 1.0, 1.0, soft_tokens=np.zeros((1, 1, 8)), pick=0)

    def sample_conditioning(pipeline, cond, start, **settings):
        seen.append(settings)
        return np.zeros((len(start), 8, 8, 3), np.uint8)

    monkeypatch.setitem(METHODS, "soft-prompt", dataclasses.replace(METHODS["soft-prompt"], run=found))
    monkeypatch.setattr(attacked, "sample_conditioning", sample_conditioning)
    argv = [
        "attack", "--model", folder if model == "tiny" else model, "--concept", "dog", "--place", "behind",
        "--images", picture_of(tmp_path), "--out", tmp_path / "out", *given,
    ]  # fmt: skip
    assert main([str(a) for a in argv]) == 0
    side = 16 if model == "tiny" else 32
    assert seen == [((3, side, side, 3), model == "world", "behind"), wanted]  # the world's original is known


@pytest.mark.slow
def test_attack(capsys, folder, tmp_path):
    argv = [
        "attack", "--model", folder, "--concept", "dog", "--images", picture_of(tmp_path),
        "--out", tmp_path / "out", "--steps", "10", "--restarts", "2", "--tokens", "2",
    ]  # fmt: skip
    assert main([str(a) for a in argv]) == 0
    assert "restart 1: denoising loss" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("restart-*-*.png"))) == 8
    assert "exists" in refused(capsys, *argv)
