"""What a cell costs: every picture that was drawn, at the guidance that it was drawn with."""

import types

import numpy as np
import pytest

from aegis_jax.attacks.given import Given
from aegis_jax.attacks.result import AttackResult
from aegis_jax.diffusion.conditioning import Conditioning
from aegis_jax.evaluation import attacked, world
from aegis_jax.report import embedded, measure, pictured
from aegis_jax.report.embedded import Embedded
from aegis_jax.report.measure import Bench
from aegis_jax.report.pictured import Pictured
from aegis_jax.report.pooled import pooled, shown

STEPS, DRAWN = 10, np.zeros((9, 2, 2, 3), np.uint8)


def part(n: int, guidance: float) -> Given:
    return Given(DRAWN[:n], ["a church"] * n, list(range(n)), steps=STEPS, guidance=guidance)


def result(n: int, **more) -> AttackResult:
    return AttackResult(["a church"] * n, Conditioning(np.zeros((n, 1, 1))), np.zeros((1, n)), 0.0, 1.0, **more)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(measure, "sample", lambda pipeline, prompts, **_: DRAWN[: len(prompts)])
    monkeypatch.setattr(measure.Viewer, "noise", lambda self, seeds: DRAWN[: len(seeds)])
    monkeypatch.setattr(attacked, "sample_conditioning", lambda pipeline, cond, start, **_: DRAWN[: len(start)])
    return Bench(types.SimpleNamespace(base=None, text="church", steps=STEPS, guidance=0.5))


def test_the_first_cases_cost_what_each_parts_guidance_does(bench):
    cost, pictures, prompts = bench._cases_of(None, [part(2, 7.5), part(9, 1.0)])
    assert len(pictures) == len(prompts) == 8
    assert cost == 2 * 2 * STEPS + 6 * STEPS


def test_pictures_under_attack_are_counted_where_they_are_drawn(bench):
    given = [part(2, 7.5), part(1, 0.5)]
    cost, pictures, _ = bench._shown(None, given, [result(2), result(1)], None)
    assert len(pictures) == 3 and cost == 2 * 2 * STEPS + STEPS
    cost, *_ = bench._shown(None, given[:1], [result(2, latents=DRAWN[:2])], None)
    assert cost == 2 * STEPS  # by the empty prompt, without guidance
    assert bench._shown(None, given[:1], [result(2, images=DRAWN[:2])], None)[0] == 0  # the attack's own


def test_plain_and_kept_pictures_cost_what_their_own_guidance_does(monkeypatch):
    monkeypatch.setattr(pictured, "sample", lambda *a, **k: DRAWN)
    monkeypatch.setattr(pictured.retention, "distances", lambda *a: {})
    subject = types.SimpleNamespace(
        steps=STEPS, guidance=1.0, shown=lambda images: np.zeros(len(images), bool), _sampled=lambda *_: DRAWN[:3],
        _rows=lambda n, seed, **_: (["a"] * 3, [0, 1, 2], [7.5, 0.5, 7.5]), near=("cat",), rulers={},
        _near=lambda *_: {"all": {"count": 0, "n": 4}}, _retained=lambda n: 3, references=lambda n, seed: {},
        asked=types.SimpleNamespace(beside="", retain="coco.csv", clip=None),
    )  # fmt: skip
    assert Pictured.plain(subject, None, 3, 0)[1] == (2 + 1 + 2) * STEPS + 3 * STEPS
    assert Pictured.retention(subject, None, 3, 0)[1] == (2 + 1 + 2) * STEPS + 4 * STEPS


def test_the_empty_prompts_pictures_are_as_many_where_rows_share_a_seed(monkeypatch):
    """From one number: what it gives image by image says `sample`."""
    seeds = []
    monkeypatch.setattr(pictured, "sample", lambda pipeline, texts, seed, **_: seeds.append(seed) or DRAWN)
    subject = types.SimpleNamespace(
        steps=STEPS, guidance=1.0, shown=lambda images: np.zeros(len(images), bool), _sampled=lambda *_: DRAWN[:3],
        _rows=lambda n, seed: (["a", "b", "c"], [0, 0, 0], [1.0] * 3), asked=types.SimpleNamespace(beside=""),
    )  # fmt: skip
    for seed in (0, 1):
        Pictured.plain(subject, None, 3, seed)
    assert all(isinstance(seed, int) for seed in seeds) and seeds[0] != seeds[1]


def test_one_wrong_attribute_of_one_image_is_no_whole_mean(monkeypatch):
    """127 of 128 answers: 63.5 images, and of two seeds 127."""
    shares = dict.fromkeys(("plain", "held_out", "same", "agreement", "open", "empty"), 1 / 64)
    monkeypatch.setattr(embedded.world, "measure", lambda *a, **k: shares | {"other": float(np.mean([1, 63 / 64]))})
    monkeypatch.setattr(embedded.world, "unasked", lambda *a, **k: {})
    subject = types.SimpleNamespace(concept=world.find("star"))
    figures, _ = Embedded.plain(subject, None, 64, 0)
    assert figures["other"] == {"count": 63.5, "n": 64} and figures["plain"] == {"count": 1, "n": 64}
    found = pooled([{"figures": figures, "cell": {"seed": seed}} for seed in (0, 1)], "other")
    assert found["count"] == 127 and shown(found)[2] == "127 of 128" and found["interval"][1] < 1


@pytest.mark.parametrize(("guidance", "each"), [(1.0, 1), (7.5, 2)])
def test_distances_count_a_prediction_by_an_adversarial_prompt_where_there_is_one(bench, monkeypatch, guidance, each):
    bench.subject.guidance = guidance
    row = {"d0": 0.0, "d1": 0.0, "d2": None}
    monkeypatch.setattr(measure.diagnostics, "distances", lambda *a, **k: {"t": 1, "words": {"a": row, "b": row}})
    cost = bench._distances(None, {"images": 2, "seed": 0}, {"a": "an adversarial prompt", "b": None})[1]
    assert cost == 2 * (2 * each * (STEPS - 1) + 3 + 4)
