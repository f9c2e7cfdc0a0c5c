"""What `fitting` refuses before an evaluation starts: all that an attack would refuse, in the attack's own words."""

import types

import numpy as np
import pytest

from aegis_jax.attacks import METHODS
from aegis_jax.attacks.given import Given
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.report.chosen import chosen, fitting
from tests.run import untrained

PROMPTS = ["a church", "a red church on the blue sky and a red dog"]  # the second has 11 tokens; the encoder sees 14


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(untrained.write(tmp_path_factory.mktemp("untrained") / "pipeline"))


def checked(pipeline, attacks, settings, prompts=PROMPTS, **how):
    subject = types.SimpleNamespace(text="church", steps=25, texts=lambda n, seed, neutral: prompts[:n])
    taken = chosen(attacks, {name: given for name, given in settings.items()}, {})
    return fitting(pipeline, subject, taken, 2, (0, 1), "thing", **how)  # (taken, left out)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("cce", {"tokens": "40", "initial": "church"}, "attack cce: .* with 40 learnt tokens exceeds the 16 positions"),
        ("cce", {"initial": "zzzz"}, "attack cce: initial='zzzz' is not one token"),
        ("ring-a-bell", {"tokens": "40"}, "attack ring-a-bell: tokens=40, wanted at most 14"),
        ("p4d-n", {"tokens": "40"}, "attack p4d-n: .*40 learnt tokens make 40 tokens, but the text encoder sees 14"),
        ("p4d-k", {}, "attack p4d-k: prompt 'a red church on .* make 15 tokens, but the text encoder sees 14"),
        ("unlearndiffatk", {"timesteps": "5000"}, "attack unlearndiffatk: timesteps=5000, but the schedule has 1000"),
        ("unlearndiffatk", {"place": "replace"}, "attack unlearndiffatk: place='replace'"),
        ("p4d-hard-prompt", {"place": "nowhere"}, "attack p4d-hard-prompt: place='nowhere' is unknown"),
        ("recall", {"timesteps": "5000"}, "attack recall: timesteps=5000, but the schedule has 1000"),
        ("word-search", {"tokens": "40"}, "attack word-search: .*40 learnt tokens exceed the 16 positions"),
        ("word-search", {"place": "nowhere"}, "attack word-search: place='nowhere' is unknown"),
        ("word-search", {"place": "neutral", "neutral": "zzzz"}, "attack word-search: neutral='zzzz' is not one whole"),
    ],
)
def test_what_an_attack_would_refuse_is_refused_before_it_starts(pipeline, name, settings, message):
    with pytest.raises(AegisError, match=message) as told:
        checked(pipeline, name, {name: settings})
    config = chosen(name, {name: settings}, {})[name]
    images = np.zeros((2, 16, 16, 3), np.uint8)
    given = Given(images, PROMPTS, [0, 1], pipeline, probability=lambda images: np.zeros(len(images)), steps=25)
    with pytest.raises(AegisError) as of_attack:
        METHODS[name].run(pipeline, "church", given, config)
    assert str(told.value) == str(of_attack.value)


def test_what_fits_is_let_pass(pipeline):
    settings = {name: {"tokens": "4"} for name in ("ring-a-bell", "p4d-n", "word-search", "unlearndiffatk")}
    settings["cce"] = {"initial": "church"}
    settings["soft-prompt"] = {"members": "before-4-denoising"}
    assert list(checked(pipeline, "all", settings, PROMPTS[:1])[0]) == list(METHODS)


def test_of_all_attacks_one_that_does_not_fit_is_left_out(pipeline):
    """One prompt too long for P4D-K would else refuse an evaluation by all the others."""
    with pytest.warns(UserWarning, match="--attacks all leaves out p4d-k: attack p4d-k: prompt 'a red church"):
        taken, left_out = checked(pipeline, "p4d-k,tina,ladder", {}, unnamed={"p4d-k", "tina", "ladder"})
    assert list(taken) == ["tina", "ladder"] and "the text encoder sees 14" in left_out.pop("p4d-k") and not left_out
    with pytest.raises(AegisError, match="attack p4d-k: prompt"):
        checked(pipeline, "p4d-k,tina", {}, unnamed={"tina"})
