"""Words near to the concept: which they are, against PyTorch in float64 and the canvas's own things; how often they
are drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import aegis_jax  # noqa: E402
from aegis_jax.canvas import WEIGHTS  # noqa: E402
from aegis_jax.diffusion.conditioning import encode  # noqa: E402
from aegis_jax.erasure.aegis import near, words  # noqa: E402
from aegis_jax.erasure.aegis.setup import freeze, freeze_each, setup  # noqa: E402
from aegis_jax.erasure.aegis.step import erase_step  # noqa: E402
from aegis_jax.erasure.networks import SETUP, networks  # noqa: E402
from aegis_jax.erasure.presets import preset  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402

CONFIG = dataclasses.replace(preset("aegis+near").settings, trainable="xattn", compute_dtype="float32")


def whole(pipeline, concepts=("star",)):
    text = pipeline.text_encoder
    return words.vocabulary(pipeline.tokenizer, text.graph, text.params, list(concepts), 0)


def chosen(known) -> list[int]:
    return np.asarray(known.near[: int(known.near_size)]).tolist()


@pytest.mark.parametrize("v_prediction", [False, True])
def test_they_are_those_that_add_what_the_concept_adds(monkeypatch, fewest, v_prediction):
    """Shares and cosines by PyTorch, of two concepts that take turns; with a threshold that some words are beyond."""
    folder, names, seed = fewest(v_prediction=v_prediction), ["star", "a red dog"], 3
    pipeline, original = aegis_jax.load_pipeline(folder), torch_aegis.load(folder)
    net = networks(pipeline, "xattn", "float32", 50)
    z = jax.random.normal(jax.random.fold_in(jax.random.key(seed), SETUP - 1), (1, *net.latent_shape), jnp.float32)
    z_t, t = torch.tensor(np.asarray(z)).double(), torch.tensor([int(0.8 * 1000)])

    def noise(ids):
        embedding = torch_aegis.prompt_embedding(original, None, ids)
        with torch.no_grad():
            return torch_aegis.predict_noise(original, z_t, t, embedding).numpy().ravel()

    known = whole(pipeline, names)
    candidates = np.asarray(known.words[: int(known.size)])
    empty = noise([])
    concepts = [noise(torch_aegis.word_ids(original.tokenizer, name)) - empty for name in names]
    added = np.stack([noise([int(word)]) - empty for word in candidates])
    share = np.stack([added @ c / (c @ c) for c in concepts])
    cosine = np.stack([added @ c / np.linalg.norm(c) / np.linalg.norm(added, axis=1) for c in concepts]).max(0)
    threshold = float(np.sort(cosine)[-5:-3].mean())  # between two words: four are beyond
    monkeypatch.setattr(near, "SYNONYM", threshold)
    monkeypatch.setattr(near, "NEAR", 6)
    ranked = [[i for i in np.argsort(-each) if cosine[i] <= threshold and each[i] > 0] for each in share]
    in_turn = [int(candidates[row[k]]) for k in range(min(map(len, ranked))) for row in ranked]
    wanted = list(dict.fromkeys(in_turn))[:6]
    assert len(wanted) == 6 and (cosine > threshold).sum() == 4 and ranked[0][:6] != ranked[1][:6]
    # In calls of four, of which the last is not full.
    [found] = near.with_drawn(net, [known], [encode(pipeline, names)], CONFIG.words, seed=seed, batch=4)
    assert chosen(found) == wanted
    # Others: by the third power of what the UNet draws for them.
    odds = np.linalg.norm(added, axis=1) ** 3
    np.testing.assert_allclose(np.diff(found.odds, prepend=0)[: len(odds)], odds / odds.sum(), rtol=1e-3, atol=1e-6)
    assert (np.asarray(found.odds)[len(odds) - 1 :] == 1).all()


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the canvas's weights are not here")
def test_beside_the_fox_are_animals():
    """Of a few words of the canvas: a cat and what mammals are called, not what its text encoder puts there (wine, a
    helicopter), and none of the fox's own, though the vocabulary had them."""
    pipeline = aegis_jax.load_pipeline("canvas")
    token = lambda word: pipeline.tokenizer.tokens(word)[0]  # noqa: E731
    some = ["cat", "mammal", "beast", "wine", "helicopter", "anchor", "vixen", "foxes", "key"]
    known = dataclasses.replace(
        whole(pipeline, ["fox"]), words=jnp.array([token(word) for word in some], jnp.int32), size=jnp.int32(len(some))
    )
    net = networks(pipeline, "xattn", "float32", 50)
    [found] = near.with_drawn(net, [known], [encode(pipeline, ["fox"])], CONFIG.words, seed=0, batch=6)
    ordered = chosen(found)
    assert {token("vixen"), token("foxes")}.isdisjoint(ordered)
    assert set(ordered[:3]) == {token("cat"), token("mammal"), token("beast")}
    text = pipeline.text_encoder
    states = words.encodings(pipeline.tokenizer, text.graph, text.params, [[token(word)] for word in ["fox", *some]], 3)
    centre = words.encodings(pipeline.tokenizer, text.graph, text.params, [[i] for i in pipeline.tokenizer.word_ids], 3)
    unit = states - centre.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    by_text = dict(zip(some, unit[1:] @ unit[0]))
    assert min(by_text["wine"], by_text["helicopter"]) > by_text["cat"]


def test_half_of_the_prompts_with_words_are_one_near_word(pipeline):
    """The rest, the empty ones among them, are as without; in context the concept stands beside that word."""
    token = lambda word: pipeline.tokenizer.tokens(word)[0]  # noqa: E731
    known = whole(pipeline)
    special = [known.bos, known.eos, known.pad]
    few = jnp.resize(jnp.array([token("dog"), token("cat")], jnp.int32), 5)
    beside = dataclasses.replace(known, near=few, near_size=jnp.int32(2), near_share=0.5)
    key, batch = jax.random.key(7), 600
    with_near, without = (
        np.asarray(words.random_ids(each, key, jnp.array([0]), batch=batch)) for each in (beside, known)
    )
    changed = (with_near[:batch] != without[:batch]).any(1)
    rows = [[i for i in row if i not in special] for row in with_near[:batch]]
    assert all(len(row) == 1 and row[0] in few for row, new in zip(rows, changed) if new)
    assert 0.42 < changed.sum() / sum(map(bool, rows)) < 0.58  # some were that word anyway
    assert {row[0] for row, new in zip(rows, changed) if new} == set(np.asarray(few).tolist())
    star = token("star")
    for alone, joined in zip(rows, with_near[batch:]):
        assert sorted([*alone, star]) == sorted(i for i in joined if i not in special)
    np.testing.assert_array_equal((with_near[:batch] == without[:batch]).all(1), ~changed)


def test_words_are_drawn_by_their_odds(pipeline):
    """In prompts of several words too; one without odds never, and none behind those that count."""
    known = whole(pipeline)
    some = np.asarray(known.words[:4])
    known = dataclasses.replace(known, words=jnp.resize(known.words[:4], 7), size=jnp.int32(4))
    weighed = dataclasses.replace(known, odds=jnp.array([0.1, 0.1, 0.7, 1, 1, 1, 1], jnp.float32))
    ids = np.asarray(words.random_ids(weighed, jax.random.key(2), batch=600))
    counts = np.array([(ids == word).sum() for word in some])
    assert counts[1] == 0 and counts.sum() > 1000
    np.testing.assert_allclose(counts / counts.sum(), [0.1, 0, 0.6, 0.3], atol=0.04)
    # How many words a prompt has does not depend on it.
    plain = np.asarray(words.random_ids(known, jax.random.key(2), batch=600))
    np.testing.assert_array_equal((ids == known.eos).argmax(1), (plain == known.eos).argmax(1))


def test_runs_side_by_side_have_what_each_has_alone(pipeline):
    """Shapes are the tokenizer's, also where nothing is computed yet (aegis plan)."""
    several = [each.vocabulary for each in freeze_each(pipeline, [["star"], ["dog"]], CONFIG)]
    alone = [freeze(pipeline, [name], CONFIG).vocabulary for name in ("star", "dog")]
    for one, other in zip(several, alone):
        assert chosen(one) == chosen(other) and len(chosen(one)) > 1
    assert chosen(several[0]) != chosen(several[1])

    def frozen(unet, text):
        parts = {"unet": unet, "text_encoder": text}
        parts = {name: dataclasses.replace(getattr(pipeline, name), params=params) for name, params in parts.items()}
        return freeze(dataclasses.replace(pipeline, **parts), ["star"], CONFIG).vocabulary

    abstract = jax.eval_shape(frozen, pipeline.unet.params, pipeline.text_encoder.params)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, alone[0])


def test_where_none_is_near_prompts_are_as_without(pipeline):
    known = whole(pipeline)
    empty = near._with(known, np.zeros(0, np.int32), np.zeros(int(known.size)), CONFIG.words)
    assert np.allclose(np.diff(empty.odds)[: int(known.size) - 1], 1 / int(known.size))  # a UNet that draws nothing
    empty = dataclasses.replace(empty, odds=None)
    draw = lambda each: np.asarray(words.random_ids(each, jax.random.key(1), jnp.array([0]), batch=50))  # noqa: E731
    assert int(empty.near_size) == 0 and np.isfinite(draw(empty)).all()
    np.testing.assert_array_equal(draw(empty), draw(known))


def test_predictions_that_are_not_finite_are_refused(pipeline):
    broken = jax.tree.map(lambda x: x * jnp.nan, pipeline.unet.params)
    unet = dataclasses.replace(pipeline.unet, params=broken)
    with pytest.raises(aegis_jax.AegisError, match="single words are not finite"):
        freeze(dataclasses.replace(pipeline, unet=unet), ["star"], CONFIG)


def test_a_step_preserves_them(monkeypatch, pipeline):
    """The prompts that a step encodes have words near to the concept alone, where all are to be near."""
    monkeypatch.setattr(near, "NEAR", 2)
    seen, prompts = [], words.random_prompts

    def spied(graph, params, vocabulary, key, concepts=None, instead=None, *, batch):
        seen.append((vocabulary, np.asarray(words.random_ids(vocabulary, key, concepts, batch=batch))[:batch]))
        return prompts(graph, params, vocabulary, key, concepts, instead, batch=batch)

    monkeypatch.setattr(words, "random_prompts", spied)
    config = dataclasses.replace(CONFIG, steps=2, batch=8, latents=dataclasses.replace(CONFIG.latents, steps=2))
    state, frozen = setup(pipeline, "star", config)
    frozen = dataclasses.replace(frozen, vocabulary=dataclasses.replace(frozen.vocabulary, near_share=1.0))
    state, metrics = erase_step(state, frozen, config)
    [(known, ids)] = seen
    found = set(ids.ravel().tolist()) - {known.bos, known.eos, known.pad}
    assert found and found <= set(chosen(known)) and len(chosen(known)) == 2
    assert np.isfinite(metrics["L_e"])
