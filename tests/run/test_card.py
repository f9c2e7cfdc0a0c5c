"""run/card.py: what the model card says of the method."""

import pytest

from aegis_jax.erasure.presets import PRESETS
from aegis_jax.run import card
from aegis_jax.run import config as run_config

METRICS = [{"L_e": 1.0, "drift_norm": 2.0}]


def text(pairs=(), source=None):
    return card.text(run_config.load(source, [("concepts", "star,red heart"), *pairs]), METRICS)


CLOSED = [name for name, found in PRESETS.items() if found.settings.steps == 1]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in CLOSED])
def test_it_names_the_preset_and_nothing_that_differs_from_it(name):
    """At any scale: steps, rate and tensors are no part of what a preset is, unless they are its own."""
    scale, own = {"steps": "8", "trainable": "kv", "latents.refresh_every": "3"}, PRESETS[name].own
    chosen = {key: value for key, value in scale.items() if key not in own}
    said = text([("method", name), *chosen.items()])
    assert f"Method: `{name}` of aegis_jax" in said and PRESETS[name].about in said
    assert "differs from that preset" not in said
    for key, words in (("steps", "8 steps of 1 latent(s)"), ("trainable", "trainable tensors: kv")):
        assert (words in said) == (key in chosen)
    for key in own & scale.keys():
        assert f"differs from that preset in `{key}=" in text([("method", name), (key, scale[key])])


@pytest.mark.parametrize("name", CLOSED)
def test_it_says_what_a_closed_form_did(name):
    said = text([("method", name)])
    assert f"Method: `{name}` of aegis_jax" in said and PRESETS[name].about in said
    assert "2 concepts jointly erased towards ''" in said and "differs from that preset" not in said
    assert "latent" not in said and "trainable" not in said
    said = text([("method", name), ("guide", "a photo,art"), ("preserve", "heart")])
    assert "towards 'a photo', 'art', holding 'heart'" in said and "differs from that preset in `guide=" in said


def test_it_says_what_differs_from_the_preset():
    said = text([("method", "paper"), ("eta", "2"), ("grp.cap", "0.5")])
    assert "It differs from that preset in `eta=2.0` (there 1.0), `grp.cap=0.5` (there 1.0)." in said
    assert "| grp.cap | 0.5 |" in said


def test_it_counts_the_latents_of_each_concept():
    assert "Latents of each concept: 500." in text()
    assert "Latents of each concept: 3 or 4." in text([("steps", "7")])


def test_the_worlds_config_is_a_preset_at_its_own_scale():
    said = card.text(run_config.load("world"), METRICS)
    assert "Method: `aegis+`" in said and "differs from that preset" not in said and "500 steps of 4 latent(s)" in said
