"""The benchmark of attacks by prompt: both sides do the same work, and other losses give no times."""

import dataclasses

import numpy as np
import pytest

from aegis_jax.attacks import METHODS
from aegis_jax.attacks.given import Given
from aegis_jax.attacks.unlearndiffatk import UnlearnDiffAtkConfig
from benchmarks import attack_prompts
from benchmarks.attack_prompts import SIDES


def test_every_prompt_is_attacked_once_on_either_side(monkeypatch):
    seen = []

    def run(pipeline, concept, given, config):
        seen.append((tuple(given.prompts), tuple(given.seeds), len(given.images), config.iterations))
        return dataclasses.make_dataclass("Result", ["losses"])(np.arange(6.0).reshape(3, 2) + given.seeds[0])

    method = METHODS["unlearndiffatk"]
    monkeypatch.setitem(METHODS, "unlearndiffatk", dataclasses.replace(method, run=run))
    given = Given(np.zeros((3, 4, 4, 3), np.uint8), ["a", "b", "c"], [5, 6, 7])
    config = UnlearnDiffAtkConfig(timesteps=2, iterations=2)
    found = {side: attack_prompts.timed(None, given, "unlearndiffatk", config, side) for side in SIDES}
    assert seen[:2] == [(("a", "b", "c"), (5, 6, 7), 3, 1), (("a", "b", "c"), (5, 6, 7), 3, 2)]
    assert seen[2:] == [(("a",), (5,), 1, 1), *[((p,), (s,), 1, 2) for p, s in zip("abc", (5, 6, 7), strict=True)]]
    assert found[SIDES[0]]["losses"] == found[SIDES[1]]["losses"] == [5.0, 7.0]  # of the first prompt
    assert all(each["prompts_per_s"] == pytest.approx(3 / each["seconds"]) for each in found.values())


def test_a_ratio_is_taken_within_rounds_and_only_of_equal_losses():
    def report(seconds, losses=(1.0, 2.0)):
        found = {"seconds": seconds, "prompts_per_s": 8 / seconds, "losses": list(losses)}
        return {"prompts": 8, **{f"p4d-hard-prompt {key}": value for key, value in found.items()}}

    results = {SIDES[0]: [report(2.0), report(4.0)], SIDES[1]: [report(6.0), report(12.0, (1.0, 2.001))]}
    found = attack_prompts.compared(results, ["p4d-hard-prompt"])["p4d-hard-prompt"]
    assert found["ratio"]["median"] == pytest.approx(3.0) and found["loss_difference"] == pytest.approx(0.001 / 1.5005)
    assert "3.00" in attack_prompts.text({"prompts": 8, "methods": {"p4d-hard-prompt": found}})
    results[SIDES[1]][0] = report(6.0, (1.0, 2.5))
    with pytest.raises(SystemExit, match="no times are given"):
        attack_prompts.compared(results, ["p4d-hard-prompt"])
