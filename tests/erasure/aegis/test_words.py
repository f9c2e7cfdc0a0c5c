"""Random words: their prompts against the tokenizer's, the words left out in the world, their part of the step against
the float64 PyTorch transcription.
"""

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import aegis_jax  # noqa: E402
from aegis_jax.diffusion.conditioning import encode  # noqa: E402
from aegis_jax.diffusion.sample import encode_text  # noqa: E402
from aegis_jax.erasure import groups, latents, trainable  # noqa: E402
from aegis_jax.erasure.aegis import context, words  # noqa: E402
from aegis_jax.erasure.aegis.config import WordsConfig  # noqa: E402
from aegis_jax.erasure.aegis.setup import setup  # noqa: E402
from aegis_jax.erasure.aegis.step import erase_step  # noqa: E402
from aegis_jax.erasure.latents import Noised  # noqa: E402
from aegis_jax.erasure.presets import preset  # noqa: E402
from aegis_jax.models.layout import torch_key  # noqa: E402
from aegis_jax.world import WEIGHTS, concepts  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402

ESD = dataclasses.replace(preset("esd").settings, trainable="xattn")
PRESERVE = WordsConfig(preserve=1.0)


@pytest.fixture
def never_empty(monkeypatch):
    """Every random prompt has a word."""
    monkeypatch.setattr(words, "EMPTY", 0.0)
    jax.clear_caches()  # programs that know the share
    yield
    jax.clear_caches()


def vocabulary(pipeline, chosen: list[str], concepts=("star",)) -> words.Vocabulary:
    """That of the chosen words alone."""
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder
    whole = words.vocabulary(tokenizer, text.graph, text.params, list(concepts), 0)
    ids = [i for word in chosen for i in tokenizer.tokens(word)]
    assert len(ids) == len(chosen)
    return dataclasses.replace(whole, words=jnp.array(ids, jnp.int32), size=jnp.int32(len(ids)))


@pytest.mark.parametrize("v_prediction", [False, True])  # padding with EOS, and with "!"
def test_prompts_are_encoded_as_if_they_had_been_typed(monkeypatch, never_empty, tiny, v_prediction):
    monkeypatch.setattr(words, "LONGEST", 3)
    pipeline = aegis_jax.load_pipeline(tiny(v_prediction=v_prediction))
    typed = [" ".join(some) for n in (1, 2, 3) for some in itertools.product(("dog", "cat"), repeat=n)]
    wanted = np.asarray(encode_text(pipeline, typed)).reshape(len(typed), -1)
    text = pipeline.text_encoder
    drawn = words.random_prompts(
        text.graph, text.params, vocabulary(pipeline, ["dog", "cat"]), jax.random.key(0), batch=200
    )
    distance = np.abs(np.asarray(drawn.embedding).reshape(200, 1, -1) - wanted).max(-1)  # (200, 14)
    assert distance.min(1).max() < 1e-5
    seen = np.bincount(distance.argmin(1), minlength=len(typed))
    assert (seen > 0).all()  # every prompt that there is
    by_length = seen[:2].sum(), seen[2:6].sum(), seen[6:].sum()
    assert min(by_length) > 40  # a third each, give or take


def test_a_share_of_the_prompts_has_no_word(tiny):
    """And among no words the concept stands alone."""
    pipeline = aegis_jax.load_pipeline(tiny())
    text = pipeline.text_encoder
    drawn = words.random_prompts(
        text.graph, text.params, vocabulary(pipeline, ["dog", "cat"]), jax.random.key(2), jnp.array([0]), batch=200
    )
    drawn = np.asarray(drawn.embedding).reshape(2, 200, -1)
    nothing, concept = np.asarray(encode_text(pipeline, ["", "star"])).reshape(2, -1)
    is_empty = np.abs(drawn[0] - nothing).max(-1) < 1e-5
    assert 50 < is_empty.sum() < 90  # 35 %, give or take 3 deviations
    np.testing.assert_array_equal(is_empty, np.abs(drawn[1] - concept).max(-1) < 1e-5)


@pytest.mark.parametrize("v_prediction", [False, True])
def test_a_concept_is_put_anywhere_among_the_words(monkeypatch, never_empty, tiny, v_prediction):
    """Latents take the concepts in turn; one has two tokens, so that the other's row is padded."""
    monkeypatch.setattr(words, "LONGEST", 2)
    pipeline = aegis_jax.load_pipeline(tiny(v_prediction=v_prediction))
    names, some = ("star", "red star"), ["dog", "cat"]
    alone = [prompt for n in (1, 2) for prompt in itertools.product(some, repeat=n)]
    text = pipeline.text_encoder
    drawn = words.random_prompts(
        text.graph, text.params, vocabulary(pipeline, some, names), jax.random.key(1), jnp.array([1, 0]), batch=200
    )
    drawn = np.asarray(drawn.embedding).reshape(2, 200, -1)
    of_alone = np.asarray(encode_text(pipeline, [" ".join(prompt) for prompt in alone])).reshape(len(alone), -1)
    nearest = np.abs(drawn[0][:, None] - of_alone).max(-1)
    assert nearest.min(1).max() < 1e-5
    for first, name in ((0, names[1]), (1, names[0])):
        seen = set()
        for row, which in zip(drawn[1, first::2], nearest.argmin(1)[first::2]):
            prompt = alone[which]
            typed = [" ".join([*prompt[:at], name, *prompt[at:]]) for at in range(len(prompt) + 1)]
            distance = np.abs(np.asarray(encode_text(pipeline, typed)).reshape(len(typed), -1) - row).max(-1)
            assert distance.min() < 1e-5, (prompt, name)
            seen.add((len(prompt), int(distance.argmin())))
        assert seen == {(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}


def test_a_concept_that_fills_the_prompt_leaves_room_for_one_word(never_empty, pipeline):
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder
    name = " ".join(["red"] * (tokenizer.model_max_length - 3))
    known = vocabulary(pipeline, ["dog"], [name])
    drawn = words.random_prompts(text.graph, text.params, known, jax.random.key(0), jnp.array([0]), batch=6)
    drawn = np.asarray(drawn.embedding)
    typed = np.asarray(encode_text(pipeline, ["dog", f"dog {name}", f"{name} dog"]))
    np.testing.assert_allclose(drawn[:6], np.broadcast_to(typed[:1], drawn[:6].shape), atol=1e-5)
    assert np.abs(drawn[6:, None] - typed[1:]).max((2, 3)).min(1).max() < 1e-5


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the world's weights are not here")
def test_the_concept_s_class_is_left_out():
    """By the text encoder alone, from the name alone: of every value of the world all synonyms and nothing else."""
    pipeline = aegis_jax.load_pipeline("world")
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder
    everything = set(map(int, tokenizer.word_ids))
    for value in itertools.chain(*concepts.ATTRIBUTES.values()):
        found = words.vocabulary(tokenizer, text.graph, text.params, [value.name], 0)
        missing = everything - set(np.asarray(found.words).tolist())
        own = {tokenizer.tokens(word)[0] for word in value.words}
        assert missing == own, value.name


def test_the_concept_s_own_tokens_are_left_out(monkeypatch, pipeline):
    """Also those whose encodings say nothing of it, as in a phrase."""
    monkeypatch.setattr(words, "SIMILAR", 1.0)
    text, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    found = words.vocabulary(tokenizer, text.graph, text.params, ["a red star", "dog"], 0)
    left = set(np.asarray(found.words).tolist())
    assert left == set(map(int, tokenizer.word_ids)) - set(tokenizer.tokens("a red star dog"))


def test_shapes_are_the_tokenizer_s(pipeline):
    """Whatever the concept, so that runs share programs; what fills the arrays up has no part in the draws."""
    text, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    names = ["star"], ["a red star"]
    several = words.vocabularies(tokenizer, text.graph, text.params, names, 0)
    assert len({jax.tree.structure(known) for known in several}) == 1
    assert len({tuple(x.shape for x in jax.tree.leaves(known)) for known in several}) == 1
    assert int(several[0].size) != int(several[1].size)
    for known, name in zip(several, names):
        alone = words.vocabulary(tokenizer, text.graph, text.params, name, 0)
        jax.tree.map(np.testing.assert_array_equal, known, alone)
        cut = dataclasses.replace(
            known, words=known.words[: int(known.size)], concepts=known.concepts[:, : int(known.lengths[0])]
        )
        draw = lambda known: words.random_prompts(  # noqa: E731
            text.graph, text.params, known, jax.random.key(3), jnp.array([0]), batch=8
        )
        np.testing.assert_array_equal(draw(known).embedding, draw(cut).embedding)


def test_of_a_large_vocabulary_a_sample_is_taken(monkeypatch, pipeline):
    """The seed's own, of the same size for each."""
    monkeypatch.setattr(words, "SIMILAR", 1.0)
    monkeypatch.setattr(words, "SAMPLE", 12)
    text, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    named = set(tokenizer.tokens("star"))
    samples = [
        set(np.asarray(words.vocabulary(tokenizer, text.graph, text.params, ["star"], seed).words).tolist())
        for seed in (0, 1, 0)
    ]
    assert samples[0] == samples[2] != samples[1]
    everything = set(map(int, tokenizer.word_ids))
    assert all(sample < everything - named and 11 <= len(sample) <= 12 for sample in samples)


def test_many_words_are_encoded_in_parts(monkeypatch, pipeline):
    """As CLIP's tens of thousands are: each row at its own end, also in the last part, which is not full."""
    text, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    rows = [tokenizer.tokens(phrase) for phrase in ("dog", "a red star", "star dog", "cat", "red")]
    states = functools.partial(words.encodings, tokenizer, text.graph, text.params)
    whole = states(rows, tokenizer.model_max_length)
    monkeypatch.setattr(words, "_AT_ONCE", 2)
    np.testing.assert_allclose(states(rows, 8), whole, atol=1e-5)
    alone = [states([row], len(row) + 2)[0] for row in rows]
    np.testing.assert_allclose(alone, whole, atol=1e-5)


def test_nothing_left_to_preserve(monkeypatch, pipeline):
    monkeypatch.setattr(words, "SIMILAR", -1.0)
    with pytest.raises(aegis_jax.AegisError, match=r"too like the concepts .*words\.preserve=0"):
        setup(pipeline, "star", dataclasses.replace(ESD, words=PRESERVE))


def one_step(patch, pipeline, config, step=0, concepts=("star",), batch=2, **given):
    """(state, metrics) after a step from theta0, or from a given state's fields, at given latents."""
    rng = np.random.default_rng(3)
    z = jnp.asarray(rng.normal(size=(batch, 8, 8, 4)).astype(np.float32))
    patch.setattr(latents, "fresh", lambda *args, **kwargs: (Noised(z, jnp.full(batch, 444)), jnp.int32(0)))
    config = dataclasses.replace(config, batch=batch)
    state, frozen = setup(pipeline, list(concepts), config)
    return erase_step(dataclasses.replace(state, step=jnp.int32(step), **given), frozen, config)


def test_at_theta0_there_is_nothing_to_preserve(monkeypatch, pipeline):
    """L_p is 0 there, and the gradient is that of L_e alone; with two concepts in a batch of three."""
    concepts = ("star", "red")
    heavy = dataclasses.replace(ESD, words=WordsConfig(preserve=5.0))
    kept, metrics = one_step(monkeypatch, pipeline, heavy, 0, concepts, 3)
    plain, their_metrics = one_step(monkeypatch, pipeline, ESD, 0, concepts, 3)
    assert metrics["L_p"] < 1e-10 and "L_p" not in their_metrics
    np.testing.assert_allclose(metrics["L_e"], their_metrics["L_e"], 1e-5)
    for name, ours in kept.opt_state.mu.items():
        theirs = np.asarray(plain.opt_state.mu[name])
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs), name


def test_every_step_and_seed_draws_its_own_words(monkeypatch, never_empty, pipeline):
    drawn, random_prompts = [], words.random_prompts

    def watched(*args, **kwargs):
        cond = random_prompts(*args, **kwargs)
        drawn.append(np.asarray(cond.embedding))
        return cond

    monkeypatch.setattr(words, "random_prompts", watched)
    config = dataclasses.replace(ESD, words=PRESERVE)
    for step, seed in ((0, 0), (1, 0), (0, 1), (1, 0)):
        one_step(monkeypatch, pipeline, dataclasses.replace(config, seed=seed), step)
    np.testing.assert_array_equal(drawn[1], drawn[3])
    for a, b in itertools.combinations(drawn[:3], 2):
        assert np.abs(a - b).max() > 1e-3
    assert np.abs(drawn[0][0] - drawn[0][1]).max() > 1e-3  # and every latent


@pytest.mark.parametrize(
    ("in_context", "v_prediction", "kappa"),
    [(False, False, None), (True, False, None), (True, True, None), (True, False, 2.0), (True, True, 2.0)],
)
def test_the_step_matches_the_transcription(monkeypatch, fewest, in_context, v_prediction, kappa):
    """The gradient that enters Adam is that of L_e + weight L_p, from a drift at which both are at work.

    In context the concept is erased from a prompt of random words, whose goal these words alone take part in; with
    kappa that goal is pushed away from what the concept adds to them, and kappa follows what is left of it.
    """
    folder = fewest(v_prediction=v_prediction)
    pipeline = aegis_jax.load_pipeline(folder)
    rng = np.random.default_rng(8)
    phrase, joined, weight = "a blue dog", "a blue star dog", 3.0
    z_t, t = rng.normal(size=(1, 8, 8, 4)).astype(np.float32), np.array([444], np.int32)
    chosen = trainable.select(pipeline.unet.params, ESD.trainable)
    drift = {path: 0.05 * rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in chosen.items()}
    typed = [phrase, joined] if in_context else [phrase]
    monkeypatch.setattr(words, "random_prompts", lambda *args, **kwargs: encode(pipeline, typed))
    monkeypatch.setattr(latents, "fresh", lambda *args, **kwargs: (Noised(jnp.asarray(z_t), jnp.asarray(t)), 0))
    how = "none" if not in_context else "push" if kappa else "erase"
    # kappa moves from the first step on.
    config = dataclasses.replace(ESD, steps=1, words=WordsConfig(preserve=weight, context=how))
    state, frozen = setup(pipeline, "star", config)
    state = dataclasses.replace(state, drift=groups.stack(drift), kappa=kappa and jnp.array([kappa]))
    after, metrics = erase_step(state, frozen, config)

    original = torch_aegis.load(folder)
    unet = copy.deepcopy(original.unet)
    weights = dict(unet.named_parameters())
    with torch.no_grad():
        for path, d in drift.items():
            weights[torch_key(path)].add_(torch.as_tensor(d.T))
    current = dataclasses.replace(original, unet=unet)

    def noise(pipeline, prompt):
        embedding = torch_aegis.prompt_embedding(original, None, torch_aegis.word_ids(original.tokenizer, prompt))
        return torch_aegis.predict_noise(pipeline, torch.tensor(z_t).double(), torch.tensor(t).long(), embedding)

    there = noise(original, phrase).detach()
    push, aim, moved = noise(original, "star") - noise(original, ""), noise(original, ""), noise(current, "star")
    if in_context:
        adds, aim, moved = noise(original, joined) - there, there, noise(current, joined)
        aim = aim - (kappa or 0.0) * adds
    L_e = torch_aegis.mse(moved - (aim - push).detach())
    L_p = torch_aegis.mse(noise(current, phrase) - there)
    np.testing.assert_allclose(metrics["L_e"], L_e.item(), 1e-4)
    np.testing.assert_allclose(metrics["L_p"], L_p.item(), 1e-4)
    if kappa:
        share = (((moved - there) * adds).sum() / (adds * adds).sum()).item()
        assert abs(share - 1) > 0.01
        np.testing.assert_allclose(metrics["left_in_context"], share, 1e-3)
        np.testing.assert_allclose(after.kappa, [kappa + context.RATE * share], 1e-3)
    mean = groups.unstack(after.opt_state.mu, drift)
    kept = [weights[torch_key(path)] for path in drift]
    for path, g_e, g_p in zip(drift, torch.autograd.grad(L_e, kept), torch.autograd.grad(L_p, kept)):
        wanted = g_e + weight * g_p
        error = np.linalg.norm(np.asarray(mean[path], np.float64).T / 0.1 - wanted.numpy())
        assert error <= 1e-3 * wanted.norm().item(), path
        assert (weight * g_p).norm() > 1e-2 * wanted.norm()  # L_p does have a say
