"""AdvUnlearn's defaults, and what takes turns in it."""

import dataclasses

import numpy as np
import pytest

from aegis_jax.erasure import advunlearn
from aegis_jax.erasure.advunlearn import step
from aegis_jax.erasure.advunlearn.config import AdvUnlearnConfig, LatentsConfig, RetainConfig
from aegis_jax.erasure.advunlearn.setup import NEUTRAL, _retained
from aegis_jax.erasure.presets import preset
from aegis_jax.erasure.texts import known, naming
from aegis_jax.errors import AegisError


def test_the_published_numbers():
    """Of the published command; the UNet's is the same but for what it trains."""
    config = preset("advunlearn").settings
    assert (config.steps, config.batch, config.learning_rate, config.eta) == (1000, 1, 1e-5, 1.0)
    attack = config.attack
    assert (attack.steps, attack.learning_rate, attack.tokens, attack.start) == (30, 1e-3, 1, "random")
    assert (config.warm_up, config.retain.batch, config.trainable) == (200, 5, "text_encoder")
    unet = preset("advunlearn-unet").settings
    assert unet == dataclasses.replace(config, method="advunlearn-unet", trainable="full")


def test_what_it_costs():
    """By hand: of a step, with 24 steps of attack on average, and 24.5 guided steps for a fresh latent."""
    cost = advunlearn.method.cost(preset("advunlearn").settings, 1)
    assert (cost.latents, cost.soft) == pytest.approx(((1 + 24 + 5) * 2 * 24.5, 24 * (1 + 1 + 1.08)))
    assert (cost.erasure, cost.words) == pytest.approx((2 + 1 + 1.08, 5 * (1 + 1 + 1.08)))
    pooled = dataclasses.replace(
        preset("advunlearn").settings, retain=RetainConfig(prompts=tuple("abcdefghij")), latents=LatentsConfig(50, 100)
    )
    # 1000 steps: ten fillings for the concept; each of ten prompts is taken 500 times, and redrawn after 500.
    assert advunlearn.method.cost(pooled, 1).latents == pytest.approx((10 + 10) * 8 * 2 * 50 / 1000)


def test_the_neutral_set_is_what_the_tokenizer_knows_without_the_concept(pipeline):
    tokenizer = pipeline.tokenizer
    found = known(tokenizer, NEUTRAL, ["a red star"])
    assert "a photo of a dog" in found and "a photo of a circle" in found
    assert not any(word in text.split() for text in found for word in ("red", "star", "chair"))
    assert set(found) < set(NEUTRAL)
    with pytest.raises(AegisError, match="of the neutral set known to this tokenizer; name your own"):
        _retained(tokenizer, ["star"], AdvUnlearnConfig(retain=RetainConfig(batch=len(NEUTRAL))))


@pytest.mark.parametrize("concept", ["a", "of a", "A dog"])
def test_no_default_prompt_names_the_concept(pipeline, concept):
    config = AdvUnlearnConfig(retain=RetainConfig(batch=1))
    try:
        found = _retained(pipeline.tokenizer, [concept], config)
    except AegisError as error:
        assert "of the neutral set known to this tokenizer; name your own" in str(error)
    else:
        assert found and not any(naming(concept).search(text) for text in found)
    given = AdvUnlearnConfig(retain=RetainConfig(prompts=(f"x {concept} y",), batch=1))
    with pytest.raises(AegisError, match="which is to be erased; leave it out"):
        _retained(pipeline.tokenizer, [concept], given)


def test_a_run_that_ends_before_its_attack_says_so():
    config = preset("advunlearn").settings
    assert "from step 201 on against a prompt that 30 steps of attack" in advunlearn.described(config, 1)
    early = dataclasses.replace(config, attack=dataclasses.replace(config.attack, warm_up=1.0))
    assert "without an attack" in advunlearn.described(early, 1) and "from step" not in advunlearn.described(early, 1)


def test_prompts_to_retain_take_turns():
    found = [step._taken(np.int32(i), 2, 5) for i in range(5)]
    assert np.concatenate([x[0] for x in found]).tolist() == [0, 1, 2, 3, 4] * 2
    assert np.concatenate([x[1] for x in found]).tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize(("name", "component"), [("advunlearn", "text_encoder"), ("advunlearn-unet", "unet")])
def test_what_changes(pipeline, name, component):
    config = preset(name).settings
    names = advunlearn.tensors(pipeline, config)
    assert len(names) == len(set(names)) > 10
    assert all(key.startswith("text_model.") == (component == "text_encoder") for key in names)
    said = advunlearn.described(config, 1)
    assert f"Only the {'UNet' if component == 'unet' else 'text encoder'} differs from the original" in said
