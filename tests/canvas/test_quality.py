"""The canvas's quality command: what it asks for and how it counts, with a model and judges of known mistakes."""

import dataclasses
import json
import types

import numpy as np
import pytest

from aegis_jax.canvas import quality
from aegis_jax.canvas.concepts import STYLES
from aegis_jax.diffusion import sample as sampling
from aegis_jax.io import hub
from aegis_jax.worlds import find

N = 144


@pytest.fixture
def model(monkeypatch):
    """Pictures whose first pixel says the prompt's number; judges that know what it asked for, and are wrong where
    stated: the first about the first 36 things, the second about half of the styles more."""
    canvas, asked = find("canvas"), []

    def sample(pipeline, prompts, *, seed, steps, guidance):
        asked.extend(prompts)
        numbers = np.arange(len(asked) - len(prompts), len(asked))
        return np.stack([np.full((32, 32, 3), divmod(k, 256) + (0,), np.uint8) for k in numbers])

    def judge(name):
        def answers(images):
            rows = [{a: i for _, a, i in canvas.named(asked[int(x[0, 0, 0]) * 256 + int(x[0, 0, 1])])} for x in images]
            found = {a: np.array([row[a] for row in rows]) for a in ("thing", "style")}
            found["subgroup"] = np.array([canvas.combinations[6 * i, 2] for i in found["thing"]])
            found["thing"][:36] = -1
            if name == "second_judge":
                found["style"][::2] = -1
            return found

        return answers

    unit = lambda x: np.ones((len(x), 1))  # noqa: E731
    scorer = types.SimpleNamespace(zero_shot=judge("judge"), embed_images=unit, embed_texts=unit)
    monkeypatch.setattr(sampling, "sample", sample)
    pipeline = types.SimpleNamespace(tokenizer=types.SimpleNamespace(ids=lambda texts: texts))
    return pipeline, dataclasses.replace(canvas, judge=judge, clip=lambda: scorer), asked


def test_what_is_counted(model):
    pipeline, world, asked = model
    result = quality.measure(pipeline, world, n=N)
    seen = result["seen"]
    assert seen["judge"] == {"thing": 0.75, "style": 1.0, "subgroup": 1.0} == seen["clip"]
    assert seen["agreement"] == {"thing": 1.0, "style": 0.5, "subgroup": 1.0} and seen["clip_score"] == 1.0
    assert result["held_out"]["judge"]["thing"] == 0.75 and set(seen["by_style"]) == set(STYLES)
    assert "75.0%" in quality.table(result) and "held out words" in quality.table(result)
    json.dumps(result)
    words = [value for row in world.attributes.values() for value in row]
    for k, text in enumerate(asked):
        (value,) = (v for v in words[: -len(world.attributes["subgroup"])] if set(v.words) & set(text.split()[-1:]))
        assert text.split()[-1] in (value.held_out if k >= N else value.seen)


def test_the_picture_has_every_thing(model, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pipeline, world, asked = model
    quality.grid(pipeline, world, tmp_path / "grid.png")
    things = len(world.attributes["thing"])
    assert len(asked) == 6 * things
    with image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (-(-things // quality.ROWS) * (72 + 6 * 32), quality.ROWS * 32)


def test_without_weights_it_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(hub.EMBEDDED, "canvas", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        quality.main([])
    assert stopped.value.code == 2 and "train them by" in capsys.readouterr().err
