"""Preservation of random words: its prompts against the tokenizer's, its words in the world, its part of the step
against the float64 PyTorch transcription.
"""

import copy
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import aegis_jax  # noqa: E402
from aegis_jax.diffusion.sample import encode_text  # noqa: E402
from aegis_jax.erasure import groups, preserve, trainable  # noqa: E402
from aegis_jax.erasure import step as step_lib  # noqa: E402
from aegis_jax.erasure.config import AETConfig, EraseConfig, GRPConfig, PreserveConfig, PromptConfig  # noqa: E402
from aegis_jax.erasure.setup import setup  # noqa: E402
from aegis_jax.models.layout import torch_key  # noqa: E402
from aegis_jax.world import WEIGHTS, concepts  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402

ESD = EraseConfig(
    trainable="xattn",
    aet=AETConfig(enabled=False),
    prompt=PromptConfig(enabled=False),
    grp=GRPConfig(retention="none"),
)


def of_words(pipeline, words: list[str]) -> preserve.Vocabulary:
    tokenizer = pipeline.tokenizer
    ids = [i for word in words for i in tokenizer.tokens(word)]
    assert len(ids) == len(words)
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return preserve.Vocabulary(jnp.array(ids, jnp.int32), *special, tokenizer.model_max_length)


@pytest.mark.parametrize("v_prediction", [False, True])  # padding with EOS, and with "!"
def test_prompts_are_encoded_as_if_they_had_been_typed(monkeypatch, tiny, v_prediction):
    monkeypatch.setattr(preserve, "_LONGEST", 3)
    pipeline = aegis_jax.load_pipeline(tiny(v_prediction=v_prediction))
    typed = [" ".join(words) for n in (1, 2, 3) for words in itertools.product(("dog", "cat"), repeat=n)]
    wanted = np.asarray(encode_text(pipeline, typed)).reshape(len(typed), -1)
    text = pipeline.text_encoder
    drawn = preserve.random_prompts(
        text.graph, text.params, of_words(pipeline, ["dog", "cat"]), jax.random.key(0), batch=200
    )
    distance = np.abs(np.asarray(drawn).reshape(200, 1, -1) - wanted).max(-1)  # (200, 14)
    assert distance.min(1).max() < 1e-5
    seen = np.bincount(distance.argmin(1), minlength=len(typed))
    assert (seen > 0).all()  # every prompt that there is
    by_length = seen[:2].sum(), seen[2:6].sum(), seen[6:].sum()
    assert min(by_length) > 40  # a third each, give or take


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")
def test_the_concept_s_class_is_left_out():
    """By the text encoder alone, from the name alone: of every value of the world all synonyms and nothing else."""
    pipeline = aegis_jax.load_pipeline("world")
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder
    everything = set(map(int, tokenizer.word_ids))
    for value in itertools.chain(*concepts.ATTRIBUTES.values()):
        found = preserve.vocabulary(tokenizer, text.graph, text.params, [value.name], PreserveConfig().similar)
        missing = everything - set(np.asarray(found.words).tolist())
        own = {tokenizer.tokens(word)[0] for word in value.words}
        assert missing == own, value.name


def test_the_concept_s_own_tokens_are_left_out(pipeline):
    """Also those whose encodings say nothing of it, as in a phrase."""
    text, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    found = preserve.vocabulary(tokenizer, text.graph, text.params, ["a red star", "dog"], 1.0)
    left = set(np.asarray(found.words).tolist())
    assert left == set(map(int, tokenizer.word_ids)) - set(tokenizer.tokens("a red star dog"))


def test_nothing_left_to_preserve(pipeline):
    config = dataclasses.replace(ESD, preserve=PreserveConfig(weight=1.0, similar=-1.0))
    with pytest.raises(aegis_jax.AegisError, match=r"preserve\.similar=-1\.0 leaves no word"):
        setup(pipeline, "star", config)


def one_step(pipeline, config, step=0, concepts=("star",), batch=2):
    """(state, metrics) after a step from theta0 at given latents."""
    rng = np.random.default_rng(3)
    z_t = jnp.asarray(rng.normal(size=(batch, 8, 8, 4)).astype(np.float32))
    state, frozen = setup(pipeline, list(concepts), dataclasses.replace(config, batch=batch))
    state = dataclasses.replace(state, step=jnp.int32(step))
    dealt, _ = step_lib._dealt(jnp.int32(step), len(concepts), batch)
    return step_lib.step_at(state, frozen, frozen.unet, dealt, z_t, jnp.full(batch, 444), config)


def test_at_theta0_there_is_nothing_to_preserve(pipeline):
    """L_p is 0 there, and the gradient is that of L_e alone; with two concepts in a batch of three."""
    concepts = ("star", "red")
    kept, metrics = one_step(pipeline, dataclasses.replace(ESD, preserve=PreserveConfig(weight=5.0)), 0, concepts, 3)
    plain, their_metrics = one_step(pipeline, ESD, 0, concepts, 3)
    assert metrics["L_p"] < 1e-10 and "L_p" not in their_metrics
    np.testing.assert_allclose(metrics["L_e"], their_metrics["L_e"], 1e-5)
    for name, ours in kept.opt_state.mu.items():
        theirs = np.asarray(plain.opt_state.mu[name])
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs), name


def test_every_step_and_seed_draws_its_own_words(monkeypatch, pipeline):
    drawn, random_prompts = [], preserve.random_prompts

    def watched(*args, **kwargs):
        drawn.append(np.asarray(random_prompts(*args, **kwargs)))
        return jnp.asarray(drawn[-1])

    monkeypatch.setattr(preserve, "random_prompts", watched)
    config = dataclasses.replace(ESD, preserve=PreserveConfig(weight=1.0))
    for step, seed in ((0, 0), (1, 0), (0, 1), (1, 0)):
        one_step(pipeline, dataclasses.replace(config, seed=seed), step)
    np.testing.assert_array_equal(drawn[1], drawn[3])
    for a, b in itertools.combinations(drawn[:3], 2):
        assert np.abs(a - b).max() > 1e-3
    assert np.abs(drawn[0][0] - drawn[0][1]).max() > 1e-3  # and every latent


def test_the_step_matches_the_transcription(monkeypatch, folder, pipeline):
    """The gradient that enters Adam is that of L_e + weight L_p, from a drift at which both are at work."""
    rng = np.random.default_rng(8)
    phrase, weight = "a blue dog", 3.0
    z_t, t = rng.normal(size=(1, 8, 8, 4)).astype(np.float32), np.array([444], np.int32)
    chosen = trainable.select(pipeline.unet.params, ESD.trainable)
    drift = {path: 0.05 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in chosen.items()}
    monkeypatch.setattr(preserve, "random_prompts", lambda *args, **kwargs: encode_text(pipeline, [phrase]))
    config = dataclasses.replace(ESD, preserve=PreserveConfig(weight=weight))
    state, frozen = setup(pipeline, "star", config)
    state = dataclasses.replace(state, drift=groups.stack(drift))
    theta = trainable.add_drift(frozen.unet, state.drift, config.trainable)
    after, metrics = step_lib.step_at(state, frozen, theta, jnp.array([0]), jnp.asarray(z_t), jnp.asarray(t), config)

    original = torch_aegis.load(folder)
    unet = copy.deepcopy(original.unet)
    weights = dict(unet.named_parameters())
    with torch.no_grad():
        for path, d in drift.items():
            weights[torch_key(path)].add_(torch.as_tensor(d.T))
    current = dataclasses.replace(original, unet=unet)
    inputs = torch_aegis.prepare(original, current, "star", z_t, t)
    L_e = torch_aegis.erasure_loss(inputs, None, None, 1.0)
    c_p = torch_aegis.prompt_embedding(original, None, torch_aegis.word_ids(original.tokenizer, phrase))
    there = torch_aegis.predict_noise(original, inputs.z_t, inputs.t, c_p).detach()
    L_p = torch_aegis.mse(torch_aegis.predict_noise(current, inputs.z_t, inputs.t, c_p) - there)
    np.testing.assert_allclose(metrics["L_e"], L_e.item(), 1e-4)
    np.testing.assert_allclose(metrics["L_p"], L_p.item(), 1e-4)
    mean = groups.unstack(after.opt_state.mu, drift)
    kept = [weights[torch_key(path)] for path in drift]
    for path, g_e, g_p in zip(drift, torch.autograd.grad(L_e, kept), torch.autograd.grad(L_p, kept)):
        wanted = g_e + weight * g_p
        error = np.linalg.norm(np.asarray(mean[path], np.float64).T / 0.1 - wanted.numpy())
        assert error <= 1e-3 * wanted.norm().item(), path
        assert (weight * g_p).norm() > 1e-2 * wanted.norm()  # L_p does have a say
