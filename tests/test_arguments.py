"""Ordinary mistakes at the public functions are one line of `AegisError`, not a traceback of what lies behind them."""

import re

import numpy as np
import pytest

import aegis_jax
from aegis_jax import AegisError, EraseConfig
from aegis_jax.diffusion.sample import latent_shape
from aegis_jax.erasure.presets import PRESETS
from aegis_jax.evaluation.metrics import neighbours
from aegis_jax.report.plan import plan
from aegis_jax.run import config
from aegis_jax.run.asked import settings
from tests.run import untrained

IMAGES = np.zeros((2, 32, 32, 3), np.uint8)
LATENTS = np.zeros((1, 4, 4, 4), np.float32)
A_PIPELINE = "wanted a Pipeline, as load_pipeline gives one, found a str"
A_PATH = "wanted a path or a name, found an object of type "
PAIRS = "wanted pairs of texts, such as [('steps', '500')]"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return aegis_jax.load_pipeline(untrained.write(tmp_path_factory.mktemp("untrained") / "pipeline"))


CALLS = [
    (lambda p: aegis_jax.sample("world", "a star"), A_PIPELINE),
    (lambda p: aegis_jax.encode_text("world", "a star"), A_PIPELINE),
    (lambda p: aegis_jax.predict_noise("world", LATENTS, 1, LATENTS[0]), A_PIPELINE),
    (lambda p: aegis_jax.predict_noise(p, LATENTS, "late", LATENTS[0]), "text embedding has shape"),
    (lambda p: aegis_jax.predict_noise(p, LATENTS, "late", aegis_jax.encode_text(p, "a star")), "t = late, wanted"),
    (lambda p: aegis_jax.decode("world", LATENTS), A_PIPELINE),
    (lambda p: latent_shape("world"), A_PIPELINE),
    (lambda p: aegis_jax.save_pipeline("world", "there"), A_PIPELINE),
    (lambda p: aegis_jax.attack("world", "star", images=IMAGES), A_PIPELINE),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, original="world"), A_PIPELINE),
    (lambda p: aegis_jax.attack(p, None, images=IMAGES), "concept = None, wanted a text"),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, prompts="ab"), "2 images, 1 prompts"),
    (lambda p: aegis_jax.attack(p, "star", images=[]), "images are float64 of shape (0,), wanted uint8 (m, H, W, 3)"),
    (lambda p: aegis_jax.attack(p, "star", images=None), "images are object of shape (), wanted uint8 (m, H, W, 3)"),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, seeds=["a", "b"]), "seeds = ['a', 'b'], wanted a whole"),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, guidance=np.nan), "guidance = nan, wanted a finite"),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, image_steps="5"), "image_steps = '5', wanted a whole number"),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, made_from=[1, 2]), "made_from = [1, 2], wanted a text"),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, without=IMAGES), "without is a ndarray, wanted a pair"),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, without=(IMAGES, "a")), "without has 2 images and 1 prompts"),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, steps="5"), "steps='5', wanted a whole number below 2**31"),
    (lambda p: aegis_jax.attack(p, "star", images=IMAGES, tokens=2.0), "tokens=2.0, wanted a whole number below"),
    (lambda p: aegis_jax.sample(p, None), "prompts = None, wanted a text or a list"),
    (lambda p: aegis_jax.encode_text(p, None), "prompts = None, wanted a text or a list"),
    (lambda p: aegis_jax.save_pipeline(p, None), A_PATH + "NoneType"),
    (lambda p: aegis_jax.write_delta(p, p, "there"), A_PATH + "Pipeline"),
    (lambda p: aegis_jax.apply_delta(p, 3), A_PATH + "int"),
    (lambda p: aegis_jax.load_pipeline(None), A_PATH + "NoneType"),
    (lambda p: aegis_jax.erase("world", 3), "config key 'concepts': got 3 (int), wanted a list of texts"),
    (lambda p: aegis_jax.erase("world", "star", overrides={"steps": 1}), PAIRS),
    (lambda p: aegis_jax.erase("world", "star", overrides=["steps=1"]), PAIRS),
    (lambda p: aegis_jax.erase("world", "star", overrides=None), PAIRS),
    (lambda p: aegis_jax.erase("world", "star", config=EraseConfig), "config is the class EraseConfig: give settings"),
    (lambda p: aegis_jax.erase("world", "star", config=EraseConfig().grp), "config is of type GRPConfig"),
    (lambda p: aegis_jax.erase("world", "star", config=5), "config is of type int"),
    (lambda p: aegis_jax.erase_each("world", 3), "concepts=3; give a list"),
    (lambda p: aegis_jax.erase_each("world", [3]), "concepts=[3]; give a list"),
    (lambda p: aegis_jax.erase_each("world", ["star", []]), "give a list"),
    (lambda p: aegis_jax.erase_each(p, ["star"], lanes="a"), "lanes='a', wanted a whole number, 1 or more"),
    (lambda p: aegis_jax.erase_each(p, ["star"], lanes=1.5), "lanes=1.5, wanted a whole number, 1 or more"),
    (lambda p: aegis_jax.evaluate(base="world", concept=None), "concept = None, wanted a text"),
    (lambda p: aegis_jax.evaluate(base="world", concept="star", seeds=0), "seeds=0: wanted a text with commas, or a"),
    (lambda p: aegis_jax.evaluate(base="world", concept="star", images="a"), "--images a: wanted a whole number"),
    (lambda p: neighbours.near(p, "star", "abcdef"), "1 words besides 'star'"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_a_mistake_is_told(pipeline, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, said = CALLS[number]
    with pytest.raises(AegisError, match=re.escape(said)) as told:
        call(pipeline)
    assert "\n" not in str(told.value) and len(str(told.value)) < 300 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": "a"}, "config key 'steps': got 'a' (str), wanted a whole number"),
        ({"steps": 1.5}, "config key 'steps': got 1.5 (float), wanted a whole number"),
        ({"batch": None, "eta": True}, "got None (NoneType), wanted a whole number; config key 'eta': got True (bool)"),
        ({"latents": None}, "config key 'latents' is a group: set latents."),
    ],
)
def test_settings_of_other_types_are_told_as_those_of_a_dict_are(pipeline, given, said):
    with pytest.raises(AegisError, match=re.escape(said)):
        settings(pipeline, "star", EraseConfig(**given))


def test_settings_are_taken_as_they_are():
    for preset in PRESETS.values():
        run = config.RunConfig(erase=preset.settings)
        assert config.typed(run) == run
    run = settings("world", "star", EraseConfig(steps=np.int64(5), learning_rate=np.float32(0.5), eta=2))
    found = run.erase.steps, run.erase.learning_rate, run.erase.eta
    assert found == (5, 0.5, 2.0) and list(map(type, found)) == [int, float, float]


def test_lists_of_an_evaluation_may_be_pythons():
    given = {"attacks": ["tina"], "seeds": [0, np.int64(1)], "near": ("heart", "ring"), "baselines": ["uce"]}
    found, _ = plan((), "world", "star", images=np.int64(4), **given)
    assert (list(found.attacks), found.seeds, found.images) == (["tina"], (0, 1), 4)
    assert found.options == (("near", "heart,ring"),) and [row.name for row in found.rows] == ["base", "uce"]


def test_whole_numbers_of_numpy_are_whole_numbers(pipeline):
    how = {"steps": 1, "seed": 3}
    wanted = aegis_jax.sample(pipeline, "a star", height=16, width=16, batch=1, **how)
    found = aegis_jax.sample(pipeline, "a star", height=np.int64(16), width=np.int32(16), batch=np.int64(1), **how)
    np.testing.assert_array_equal(found, wanted)
