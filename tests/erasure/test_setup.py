"""How soft tokens start."""

import dataclasses

import numpy as np
import pytest

from aegis_jax.erasure.config import AETConfig, EraseConfig, PromptConfig
from aegis_jax.erasure.setup import setup
from aegis_jax.errors import AegisError
from aegis_jax.io.pipeline import load_pipeline


def _words(pipeline):
    table = pipeline.text_encoder.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    return np.asarray(table, np.float32)[pipeline.tokenizer.word_ids]


def test_random_tokens_are_words_and_mean_tokens_their_mean(tiny):
    pipeline = load_pipeline(tiny())
    config = EraseConfig(aet=AETConfig(tokens=2), prompt=PromptConfig(init="mean", tokens=3))
    state, _ = setup(pipeline, ["star", "red"], config)
    words = _words(pipeline)
    assert state.v.shape == (2, 2, words.shape[1]) and state.p.shape == (2, 3, words.shape[1])
    for token in np.asarray(state.v).reshape(-1, words.shape[1]):
        assert np.abs(words - token).max(1).min() == 0
    np.testing.assert_allclose(state.p, np.broadcast_to(words.mean(0), state.p.shape), atol=1e-6)


def test_tokens_may_start_at_their_own_concept(tiny):
    pipeline = load_pipeline(tiny())
    concepts = ["star", "a red thing"]
    state, _ = setup(pipeline, concepts, EraseConfig(aet=AETConfig(tokens=2, init="concept")))
    table = pipeline.text_encoder.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    for v, concept in zip(state.v, concepts, strict=True):
        mean = np.asarray(table, np.float32)[pipeline.tokenizer.tokens(concept)].mean(0)
        np.testing.assert_allclose(v, np.broadcast_to(mean, v.shape), atol=1e-6)


def test_each_prefix_has_a_start_of_its_own(tiny):
    """Row i of the soft tokens belongs to concept i mod K; the concepts and their latents are there once."""
    pipeline = load_pipeline(tiny())
    state, frozen = setup(pipeline, ["star", "red"], EraseConfig(prompt=PromptConfig(prefixes=2, tokens=3)))
    wanted, same = setup(pipeline, ["star", "red", "star", "red"], EraseConfig(prompt=PromptConfig(tokens=3)))
    for ours, theirs in ((state.p, wanted.p), (state.v, wanted.v)):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(frozen.prompt_template, same.prompt_template[:2])
    assert not np.array_equal(state.p[0], state.p[2])
    with pytest.raises(AegisError, match="prompt.prefixes=2 .*without an adversarial prompt"):
        setup(pipeline, "star", EraseConfig(prompt=PromptConfig(enabled=False, prefixes=2)))


def test_an_unknown_start_is_refused(tiny):
    config = dataclasses.replace(EraseConfig(), aet=AETConfig(init="zero"))
    with pytest.raises(AegisError, match="aet.init='zero'"):
        setup(load_pipeline(tiny()), "star", config)


@pytest.mark.parametrize("width", [48, [32, 48]])
def test_a_text_encoder_of_another_width_is_refused(width, tiny):
    pipeline = load_pipeline(tiny())
    config = pipeline.unet.config | {"cross_attention_dim": width}
    pipeline = dataclasses.replace(pipeline, unet=dataclasses.replace(pipeline.unet, config=config))
    with pytest.raises(AegisError, match="cross_attention_dim=.* hidden_size is 32"):
        setup(pipeline, "star", EraseConfig())
