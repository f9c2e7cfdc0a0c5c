"""Several attributes at once: what is counted, with sampling and judge stood in for, and once on the world itself."""

import numpy as np
import pytest

from aegis_jax import judges
from aegis_jax.evaluation import world
from aegis_jax.evaluation.metrics import composition as lib
from aegis_jax.io.pipeline import load_pipeline
from aegis_jax.judges.judge import Judge
from aegis_jax.world import WEIGHTS, concepts

STAR = world.find("star")
GROUPS = tuple((*(value.name for value in row), f"no {name}") for name, row in concepts.ATTRIBUTES.items())
LABELS = tuple(label for group in GROUPS for label in group)


def test_prompts_state_the_concept_and_two_more():
    prompts, labels = lib.full_prompts(STAR, 50, 0)
    assert (labels[:, 0] == STAR.index).all()
    assert len({tuple(row) for row in labels[:24]}) == 24  # each colour and texture with it, once
    for prompt, row in zip(prompts, labels):
        assert [(a, i) for _, a, i in sorted(concepts.named(prompt), key=lambda x: "sct".index(x[1][0]))] == list(
            zip(("shape", "colour", "texture"), row)
        )


def test_what_is_counted(monkeypatch):
    """A model that draws a circle for every star, forgets every third texture, and is right otherwise."""
    drawn = []

    def sample(pipeline, prompts, **settings):
        for k, prompt in enumerate(prompts):
            values = {attribute: index for _, attribute, index in concepts.named(prompt)}
            row = [values[name] for name in concepts.ATTRIBUTES]
            row[0] = 0 if row[0] == STAR.index else row[0]
            row[2] = (row[2] + 1) % 4 if k % 3 == 0 else row[2]
            drawn.append(row)
        return np.arange(len(drawn) - len(prompts), len(drawn), dtype=np.uint8)[:, None, None, None].repeat(3, 3)

    def compute(images):
        p = np.zeros((len(images), len(LABELS)), np.float32)
        for k, number in enumerate(images[:, 0, 0, 0]):
            for group, index in zip(GROUPS, drawn[number]):
                p[k, LABELS.index(group[index])] = 1
        return p

    monkeypatch.setattr(lib, "sample", sample)
    judge = Judge("fake", LABELS, compute, "0", groups=GROUPS)
    found = lib.composition(None, STAR, judge, n=30)
    counts = {name: (row["count"], row["n"]) for name, row in found.items()}
    assert counts == {
        "rest": (50, 60), "rest_together": (20, 30), "together": (20, 30),
        "UA": (30, 30), "IRA": (30, 30), "CRA": (100, 120), "CRA_retained": (50, 60),
    }  # fmt: skip


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")
def test_the_world_composes():
    found = lib.composition(load_pipeline("world"), STAR, judges.load("world"), n=8)
    assert found["rest"]["share"] >= found["rest_together"]["share"] > 0.6, found
    assert found["together"]["share"] > 0.6, found
