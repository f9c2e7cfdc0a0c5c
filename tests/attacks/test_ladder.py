"""The ladder: which row is which rung of which prompt, from what noise, and how it is counted; the world's own."""

import numpy as np
import pytest

from aegis_jax.attacks import attack
from aegis_jax.attacks.result import ATTACK, FAILED, NOT_NEEDED, SUCCEEDED
from aegis_jax.diffusion.sample import sample
from aegis_jax.errors import AegisError
from aegis_jax.evaluation import cases, world
from aegis_jax.evaluation.ladder import ladder
from aegis_jax.io.pipeline import load_pipeline
from tests.tiny import FEWEST

PROMPTS = ["a red star", "star", "a star"]
RUNGS = {"name": ["a star"], "other": ["a heart", "blue heart"]}


def test_every_prompt_is_asked_in_the_words_of_every_rung(tiny):
    pipeline, seen = load_pipeline(tiny(**FEWEST)), []

    def judge(images):
        seen.append(images)
        hits = [True, False, False, True, False, False] if len(seen) == 1 else [True, False, False]
        return np.array(hits)

    how = {"method": "ladder", "images": np.zeros((3, 8, 8, 3), np.uint8), "prompts": PROMPTS, "seeds": [5, 6, 7]}
    found = attack(pipeline, "star", **how, wordings=RUNGS, judge=judge, image_steps=2, guidance=3.0)
    said = ["a star", "a heart", "a star", "blue heart", "a star", "a heart"]
    assert found.prompts == said
    wanted = sample(pipeline, said, seed=[5, 5, 6, 6, 7, 7], steps=2, guidance=3.0)
    assert np.abs(wanted.astype(int) - seen[0]).max() <= 1 and len(seen[1]) == 3
    assert found.outcomes == [NOT_NEEDED] * 2 + [FAILED, SUCCEEDED, FAILED, FAILED]
    assert {rung: hits.tolist() for rung, hits in found.levels[ATTACK].items()} == {
        "name": [True, False, False], "other": [False, True, False],
    }  # fmt: skip
    tally = cases.counts(found, 2)
    assert tally["together"]["count"] == 2 and tally["each"] == [0, 1] and tally["levels"][ATTACK]["name"]["count"] == 1
    assert found.unet_evaluations == (6 + 3) * 2 * 2
    with pytest.raises(AegisError, match="needs wordings"):
        attack(pipeline, "star", **how)


BOTH = [("star", "world"), ("red", "world"), ("striped", "world"), ("fox", "canvas"), ("twemoji", "canvas")]


@pytest.mark.parametrize(("name", "within"), BOTH)
def test_the_worlds_ladder_names_the_value_on_every_rung_and_its_control_on_none(name, within):
    concept = world.find(name, within)
    both = len(concept.world.domains) - 1  # all that can be stated beside the concept
    rungs, control = (ladder(concept, 9, seed=4, word=word) for word in (None, "thing"))
    of_rung = {"name": [name], "prefix": [name], "variant": concept.value.seen[1:], "held-out": concept.value.held_out}
    for rung, prompts in rungs.items():
        for prompt, neutral in zip(prompts, control[rung], strict=True):
            named = [word for word in prompt.split() if word in concept.value.words]
            assert len(named) == 1 and named[0] in of_rung.get(rung, concept.value.words)
            other = {word for word in prompt.split() if world.find(word, within) not in (None, concept)}
            assert len(other) == {"prefix": 1, "short": both, "long": both}.get(rung, 0)
            assert "thing" in neutral.split() and not set(neutral.split()) & set(concept.value.words)
            assert other <= set(neutral.split())
