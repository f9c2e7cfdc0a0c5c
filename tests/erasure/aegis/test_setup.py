"""How a run starts: soft tokens, pools, and what is refused before it."""

import dataclasses
import importlib
import types

import jax
import numpy as np
import pytest

from aegis_jax.erasure import latents, networks
from aegis_jax.erasure.aegis import words
from aegis_jax.erasure.aegis.config import EraseConfig, GRPConfig, LatentsConfig, SoftConfig, WordsConfig, check
from aegis_jax.erasure.aegis.setup import _pools, setup, uses_pool
from aegis_jax.erasure.presets import preset
from aegis_jax.errors import AegisError


def test_what_all_runs_concepts_are_is_encoded_in_one_call(pipeline, monkeypatch):
    """And each run has what it has alone."""
    setup_lib = importlib.import_module("aegis_jax.erasure.aegis.setup")  # in its room that is the function
    config = EraseConfig(words=WordsConfig(preserve=1.0))
    runs = [["star", "a red star"], ["dog", "red"], ["cat", "star"]]
    alone = [setup_lib.freeze(pipeline, concepts, config) for concepts in runs]
    encoded, states = [], []
    encode, encodings = setup_lib.encode, words.encodings
    for module in (setup_lib, networks):
        monkeypatch.setattr(module, "encode", lambda p, texts: encoded.append(texts) or encode(p, texts))
    monkeypatch.setattr(words, "encodings", lambda *args: states.append(args[3]) or encodings(*args))
    together = setup_lib.freeze_each(pipeline, runs, config)
    assert encoded == ["", ["star", "a red star", "dog", "red", "cat", "star"]] and len(states) == 2
    for ours, theirs in zip(together, alone, strict=True):
        for name in ("concept_emb", "target_template", "prompt_template", "vocabulary"):
            for one, other in zip(*(jax.tree.leaves(getattr(x, name)) for x in (ours, theirs)), strict=True):
                np.testing.assert_allclose(one, other, 1e-5, 1e-6)
        assert ours.unet is together[0].unet


def test_only_soft_tokens_and_words_take_room_from_a_concept(pipeline):
    room = pipeline.tokenizer.model_max_length - 2
    esd, longest = preset("esd").settings, " ".join(["star"] * room)
    assert len(pipeline.tokenizer.tokens(longest)) == room
    _, frozen = setup(pipeline, [longest], esd)
    assert frozen.target_template.shape[1] == room + 2
    for config in (EraseConfig(), dataclasses.replace(esd, words=WordsConfig(context="erase"))):
        with pytest.raises(AegisError, match=f"room for {room - 1} besides"):
            setup(pipeline, [longest], config)


def _words(pipeline):
    table = pipeline.text_encoder.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    return np.asarray(table, np.float32)[pipeline.tokenizer.word_ids]


def test_soft_tokens_are_words(pipeline):
    state, _ = setup(pipeline, ["star", "red"], EraseConfig(soft=SoftConfig(tokens=3)))
    words = _words(pipeline)
    assert state.v.shape == state.p.shape == (2, 3, words.shape[1])
    tokens = np.concatenate([np.asarray(x).reshape(-1, words.shape[1]) for x in (state.v, state.p)])
    for token in tokens:
        assert np.abs(words - token).max(1).min() == 0
    assert len(np.unique(tokens, axis=0)) > 6  # each drawn for itself


def test_each_prefix_has_a_start_of_its_own(pipeline):
    """Row i of the soft tokens belongs to concept i mod K; the concepts and their latents are there once."""
    state, frozen = setup(pipeline, ["star", "red"], EraseConfig(soft=SoftConfig(prefixes=2, tokens=3)))
    wanted, same = setup(pipeline, ["star", "red", "star", "red"], EraseConfig(soft=SoftConfig(tokens=3)))
    for ours, theirs in ((state.p, wanted.p), (state.v, wanted.v)):
        np.testing.assert_array_equal(ours, theirs)
    for name in ("prompt_template", "target_template"):
        np.testing.assert_array_equal(getattr(frozen, name), getattr(same, name)[:2])
    assert not np.array_equal(state.p[0], state.p[2]) and not np.array_equal(state.v[0], state.v[2])


def test_both_templates_end_in_the_concept(pipeline):
    """[BOS, slot, red, star, EOS...] for the target too: c' is a prefix before the concept, as c* is."""
    _, frozen = setup(pipeline, "red star", EraseConfig())
    table = pipeline.text_encoder.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    ids = pipeline.tokenizer.tokens("red star")
    assert len(ids) == 2
    for template in (frozen.target_template, frozen.prompt_template):
        np.testing.assert_array_equal(template[0, 2:4], np.asarray(table)[ids])
        np.testing.assert_array_equal(template[0, 4], np.asarray(table)[pipeline.tokenizer.eos_token_id])


def test_fewer_latents_than_concepts_are_refused(pipeline):
    """Some concept would be named in the card and never have been erased."""
    few = EraseConfig(steps=2, batch=1)
    with pytest.raises(AegisError, match="steps=2 x batch=1 give 2 latents for 3 concepts"):
        setup(pipeline, ["star", "red", "blue"], few)
    setup(pipeline, ["star", "red"], few)


@pytest.mark.parametrize(("concepts", "said"), [([], "no concept"), ("", "empty"), (["star", " "], "empty")])
def test_refuses_concepts_without_words(pipeline, concepts, said):
    with pytest.raises(AegisError, match=said):
        setup(pipeline, concepts, EraseConfig())


def test_a_concept_needs_room_for_its_soft_tokens(pipeline):
    room = pipeline.tokenizer.model_max_length - 2
    setup(pipeline, " ".join(["red"] * (room - 4)), EraseConfig(soft=SoftConfig(tokens=4)))
    with pytest.raises(AegisError, match=f"has {room - 3} tokens, .* room for {room - 4} besides"):
        setup(pipeline, " ".join(["red"] * (room - 3)), EraseConfig(soft=SoftConfig(tokens=4)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"soft": SoftConfig(use="v")}, "soft.use='v'"),
        ({"soft": SoftConfig(life="always")}, "soft.life='always'"),
        ({"soft": SoftConfig(use="none", prefixes=2)}, "soft.prefixes=2 .*where soft.use is none"),
        ({"soft": SoftConfig(gamma=-1.0)}, "soft.gamma=-1.0"),
        ({"soft": SoftConfig(tokens=0)}, "soft.tokens=0"),
        ({"grp": GRPConfig(rule="linear")}, "grp.rule='linear'"),
        ({"grp": GRPConfig(rule="constant")}, "grp.omega=0.0 .*where grp.rule is constant"),
        ({"grp": GRPConfig(cap=0.0)}, "grp.cap=0.0"),
        ({"latents": LatentsConfig(refresh_every=0)}, "latents.refresh_every=0"),
        ({"latents": LatentsConfig(steps=1)}, "latents.steps=1"),
        ({"steps": 0, "batch": 0}, "steps=0 .*; batch=0"),  # all at once
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_values_out_of_range_are_named(changes, said):
    with pytest.raises(AegisError, match=said):
        check(dataclasses.replace(EraseConfig(), **changes))


@pytest.mark.parametrize("width", [48, [48]])
def test_a_text_encoder_of_another_width_is_refused(width, pipeline):
    config = pipeline.unet.config | {"cross_attention_dim": width}
    pipeline = dataclasses.replace(pipeline, unet=dataclasses.replace(pipeline.unet, config=config))
    with pytest.raises(AegisError, match="cross_attention_dim=.* hidden_size is 32"):
        setup(pipeline, "star", EraseConfig())


@pytest.mark.parametrize(
    ("soft", "shared", "pools"),
    [
        ({}, False, {"attack", "loss"}),
        ({}, True, {"attack"}),
        ({"beta": 0.0, "gamma": 0.0}, False, {"loss"}),
        ({"use": "none"}, False, {"loss"}),
        ({"use": "none"}, True, {"attack"}),
    ],
)
def test_a_pool_for_every_latent_that_a_step_draws(pipeline, soft, shared, pools):
    config = EraseConfig(soft=SoftConfig(**soft), latents=LatentsConfig(steps=5, refresh_every=2, shared=shared))
    state, _ = setup(pipeline, ["star", "red"], config)
    assert state.latents.keys() == pools
    for pool in state.latents.values():
        assert pool.z.shape == (2, 5, 8, 8, 8, 4) and not pool.drawn.any()
    fresh, _ = setup(pipeline, "star", dataclasses.replace(config, latents=LatentsConfig(shared=shared)))
    assert fresh.latents == {}


def test_pools_are_bounded_whatever_the_number_of_concepts():
    """At 64x64 latents, of 1 to 1,000 concepts: two pools of 64 concepts at the most, and none beyond."""
    of_sd14 = types.SimpleNamespace(latent_shape=(64, 64, 4), placement=None)
    config = EraseConfig(batch=4, latents=LatentsConfig(refresh_every=50))
    each = 50 * 8 * 64 * 64 * 4 * 4  # bytes of a concept: 50 grid positions, 8 trajectories, float32
    for concepts in (1, 2, 63, 64, 65, 500, 1000):
        pools = _pools(of_sd14, concepts, config)
        size = sum(leaf.size * leaf.dtype.itemsize for pool in pools.values() for leaf in jax.tree.leaves(pool))
        assert size <= 2 * 64 * (each + 1) and bool(pools) == (concepts <= 64)
        assert uses_pool(config, concepts) == (concepts <= latents.MOST_CONCEPTS)
    # A concept that has two latents in the whole run needs no eight trajectories.
    few = _pools(of_sd14, 10, dataclasses.replace(config, steps=5))
    assert {pool.z.shape[2] for pool in few.values()} == {2}
