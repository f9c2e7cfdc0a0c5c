"""run/asked.py: what the arguments of `erase` ask for."""

import dataclasses

import pytest

import aegis_jax
from aegis_jax import EraseConfig
from aegis_jax.erasure.advunlearn import AdvUnlearnConfig
from aegis_jax.erasure.aegis.config import LatentsConfig, WordsConfig
from aegis_jax.erasure.closed.config import UCEConfig
from aegis_jax.erasure.presets import PRESETS, preset
from aegis_jax.errors import AegisError
from aegis_jax.run.asked import settings
from aegis_jax.run.config import RunConfig


def asked(config, saved=None):
    return settings("world" if saved is None else None, "star" if saved is None else None, config, saved=saved)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_of_a_preset_are_taken_however_they_are_given(name):
    wanted = dataclasses.replace(preset(name).settings, seed=3)
    by_name = {"method": name, "seed": 3}
    found = asked(wanted).erase
    assert type(found) is type(wanted) and asked(RunConfig(erase=wanted)).erase == found
    assert asked(by_name).erase == found and found.method == name


@pytest.mark.parametrize("name", ["aegis+", "esd", "paper-latest", "released"])
def test_a_presets_name_without_its_settings_is_refused(name):
    with pytest.raises(AegisError, match="has none of that preset's settings .*give config={'method': "):
        asked(EraseConfig(method=name, steps=7))
    with pytest.raises(AegisError, match="has none of that preset's settings"):
        asked(RunConfig(erase=EraseConfig(method=name)))
    assert asked(EraseConfig(steps=7)).erase.steps == 7
    changed = dataclasses.replace(preset(name).settings, eta=2.0, steps=7)
    assert asked(changed).erase.eta == 2.0


@pytest.mark.parametrize(
    "config",
    [
        EraseConfig(method="uce"), EraseConfig(method="age"), UCEConfig(method="paper"), UCEConfig(method="oce"),
        AdvUnlearnConfig(method="stereo"), RunConfig(erase=EraseConfig(method="speed")),
        dataclasses.replace(preset("aegis+near").settings, words=WordsConfig(preserve=5.0, context="push")),
        dataclasses.replace(preset("esd-x-2025").settings, latents=LatentsConfig(shared=True)),
    ],
)  # fmt: skip
def test_settings_of_another_class_are_refused(config):
    with pytest.raises(AegisError, match="method=.* has settings of class .*, got "):
        asked(config)


def test_advunlearn_of_the_unet_trains_the_unet():
    with pytest.raises(AegisError, match=r"trainable='text_encoder' \(want full"):
        asked(AdvUnlearnConfig(method="advunlearn-unet"))
    assert asked({"method": "advunlearn-unet"}).erase.trainable == "full"


def test_a_group_that_is_none_is_named():
    with pytest.raises(AegisError, match="config key 'words' is a group"):
        asked(EraseConfig(method="aegis+", words=None))


def test_an_unknown_method_is_named():
    with pytest.raises(AegisError, match="unknown method 'aegys'"):
        asked(EraseConfig(method="aegys"))


def test_a_dict_changes_what_the_saved_run_has():
    saved = asked({"method": "uce", "lamb": 0.1, "picture": {"images": 0}})
    for again in ({"method": "uce", "lamb": 0.1, "picture": {"images": 0}}, {"lamb": 0.1}, {}, {"method": "uce"}):
        assert asked(again, saved) == saved
    with pytest.raises(AegisError, match="lamb was 0.1, is 0.2"):
        asked({"lamb": 0.2}, saved)
    with pytest.raises(AegisError, match="method was 'uce', is 'paper'"):
        asked({"method": "paper"}, saved)


@pytest.mark.parametrize("concepts", [["star", "Star"], ["star", " STAR  "], ["red star", "red  star"]])
def test_a_concept_in_another_spelling_counts_once(concepts):
    assert settings("world", concepts, None).concepts == (concepts[0],)


def test_a_concept_is_not_preserved_in_another_spelling():
    with pytest.raises(AegisError, match="preserve names 'Red  star', which is to be erased"):
        aegis_jax.erase("world", "red star", config={"method": "uce", "preserve": ["Red  star"]})
