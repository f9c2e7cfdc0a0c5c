"""Trajectories of the concept among random words: theta0's verdict on them, against PyTorch in float64 and on what it
drew itself; which words, latents and verdicts a draw takes; what the step makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import aegis_jax  # noqa: E402
from aegis_jax.diffusion.conditioning import encode, encode_ids  # noqa: E402
from aegis_jax.erasure import latents  # noqa: E402
from aegis_jax.erasure.aegis import context, shown  # noqa: E402
from aegis_jax.erasure.aegis.config import check_concepts  # noqa: E402
from aegis_jax.erasure.aegis.setup import freeze, setup  # noqa: E402
from aegis_jax.erasure.aegis.step import erase_step, predicted  # noqa: E402
from aegis_jax.erasure.presets import preset  # noqa: E402
from aegis_jax.errors import AegisError  # noqa: E402
from tests.parity import torch_aegis  # noqa: E402

CONFIG = dataclasses.replace(preset("aegis+shown").settings, trainable="xattn", compute_dtype="float32")
SMALL = dataclasses.replace(CONFIG, steps=6, batch=4, latents=dataclasses.replace(CONFIG.latents, steps=3))


def ids_of(tokenizer, prompts: list[str]) -> np.ndarray:
    end = [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * tokenizer.model_max_length
    rows = [[tokenizer.bos_token_id, *tokenizer.tokens(prompt), *end] for prompt in prompts]
    return np.array([row[: tokenizer.model_max_length] for row in rows], np.int32)


@pytest.mark.parametrize("v_prediction", [False, True])
def test_the_verdict_matches_the_transcription(fewest, v_prediction):
    folder = fewest(v_prediction=v_prediction)
    pipeline, original = aegis_jax.load_pipeline(folder), torch_aegis.load(folder)
    frozen = freeze(pipeline, ["star"], CONFIG)
    without, joined = ["dog", "a blue cat"], ["dog star", "a star blue cat"]
    ids = np.stack([ids_of(pipeline.tokenizer, prompts) for prompts in (without, joined)])
    z_0, key = np.random.default_rng(3).normal(size=(2, *frozen.latent_shape)).astype(np.float32), jax.random.key(5)
    found = jax.jit(shown.resemblance)(frozen, z_0, ids, key)

    def noise(prompt, z_t, t):
        embedding = torch_aegis.prompt_embedding(original, None, torch_aegis.word_ids(original.tokenizer, prompt))
        with torch.no_grad():
            return torch_aegis.predict_noise(original, torch.tensor(z_t).double(), t, embedding).numpy()

    signals = np.asarray(frozen.schedule.alphas_cumprod, np.float64)
    for m in range(2):
        better = apart = 0.0
        for level, key_n in enumerate(jax.random.split(key, 16)):
            t = int((0.1 + 0.8 * level / 15) * 1000 + 1e-4)
            n = np.asarray(jax.random.normal(key_n, z_0.shape, jnp.float32), np.float64)[m : m + 1]
            z_t = signals[t] ** 0.5 * z_0[m : m + 1] + (1 - signals[t]) ** 0.5 * n
            w, c = (noise(prompts[m], z_t, torch.tensor([t])) for prompts in (without, joined))
            better += ((w - n) ** 2).sum() - ((c - n) ** 2).sum()
            apart += ((c - w) ** 2).sum()
        np.testing.assert_allclose(found[m], better / apart, 1e-2)  # both are small differences of like predictions


def test_on_the_world_the_original_tells_what_it_drew():
    """The star in what was drawn for it among words, and not in what was drawn for the words alone."""
    frozen = freeze(aegis_jax.load_pipeline("world"), ["star"], CONFIG)
    ids = shown.words_of(frozen.vocabulary, 0, 1, jnp.int32(0), 8)
    draw = jax.jit(
        lambda rows: latents.trajectories(
            frozen, frozen.unet, encode_ids(frozen.text_graph, frozen.text, rows), jax.random.key(1), (20, 8), False
        )[-1]
    )
    verdict = jax.jit(lambda z_0: shown.resemblance(frozen, z_0, ids, jax.random.key(2)))
    alone, among = (np.asarray(verdict(draw(rows))) for rows in ids)
    assert (among > shown.LEAST).mean() > 0.9
    assert np.median(alone) < shown.LEAST < 0 < np.median(among)  # a star comes unasked too


def draws(frozen, pool, concepts, numbers, **more):
    """`shown.drawn` in the steps `numbers`, of the same concepts: [(Drawn, pool on the host)]."""
    found = []
    for step in numbers:
        visits = jnp.full(len(concepts), step, jnp.int32)
        drawn, pool = shown.drawn(
            frozen, frozen.unet, pool, jnp.asarray(concepts), visits, jnp.uint32(7), jnp.int32(step),
            batch=4, refresh_every=1, **more,
        )  # fmt: skip
        found.append((jax.device_get(drawn), jax.device_get(pool)))
    return found


def test_a_draw_takes_latent_words_and_verdict_of_one_trajectory(pipeline, monkeypatch):
    """Of the latent's own concept, with the words of the step that the trajectory was drawn in; two concepts share a
    batch, so their trajectories serve two steps."""
    monkeypatch.setattr(shown, "LEAST", 0.0)
    # By the words themselves, so that every trajectory has another and it can be told again.
    verdicts = lambda frozen, z_0, ids, key: jnp.cos(ids[1].sum(1).astype(jnp.float32))  # noqa: E731
    monkeypatch.setattr(shown, "resemblance", verdicts)
    jax.clear_caches()
    frozen = freeze(pipeline, ["star", "red dog"], SMALL)
    pool = shown.empty(latents.empty_pool(frozen, 2, 99, 3))
    found = draws(frozen, pool, [0, 1], range(4))
    jax.clear_caches()
    assert [pool.number.tolist() for _, pool in found] == [[1, 1], [1, 1], [3, 3], [3, 3]]
    assert (found[0][1].z == found[1][1].z).all() and not (found[1][1].z == found[2][1].z).any()
    for drawn, pool in found:
        number, seen = int(pool.number[0]), set()
        for row in range(4):
            concept = row % 2
            own = np.asarray(shown.words_of(frozen.vocabulary, jnp.uint32(7), number, jnp.int32(concept), 8))
            assert pool.shown[concept].tolist() == (np.cos(own[1].sum(1)) > 0).tolist()
            where = (pool.z[concept] == drawn.at.z[row]).all((2, 3, 4)).nonzero()
            [i], [m] = where
            assert drawn.ids[[row, 4 + row]].tolist() == own[:, m].tolist()
            assert drawn.shown[row] == pool.shown[concept, m]
            assert 333 * (2 - i) <= drawn.at.t[row] < 333 * (3 - i)
            seen.add((concept, m))
        assert len(seen) > 1


def test_words_without_and_with_the_concept(pipeline):
    """Differ by the concept alone, from step to step and from concept to concept."""
    tokenizer = pipeline.tokenizer
    known = freeze(pipeline, ["star", "red dog"], SMALL).vocabulary
    all_rows = [shown.words_of(known, 7, number, jnp.int32(k), 8) for number in (1, 2) for k in (0, 1)]
    assert len({rows.tobytes() for rows in map(np.asarray, all_rows)}) == 4
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for rows, concept in zip(all_rows, ["star", "red dog"] * 2):
        for without, joined in zip(*np.asarray(rows)):
            said = sorted(i for i in joined if i not in special)
            assert said == sorted([i for i in without if i not in special] + tokenizer.tokens(concept))


def test_what_is_shown_is_pushed_the_harder(pipeline, monkeypatch):
    """In context the goal is less d, and where the trajectory shows the concept less kappa d more; kappa rises by the
    share of those, from the first step on."""
    config = dataclasses.replace(SMALL, batch=2)
    frozen, goals = freeze(pipeline, ["star"], config), []
    ids = np.concatenate([ids_of(pipeline.tokenizer, prompts) for prompts in (["dog"] * 2, ["dog star"] * 2)])
    z = jax.random.normal(jax.random.key(8), (2, *frozen.latent_shape))
    made = context.in_context
    monkeypatch.setattr(context, "in_context", lambda *args: goals.append(made(*args)) or goals[-1])
    for seen in (0.0, 1.0):
        drawn = shown.Drawn(latents.Noised(z, jnp.array([444, 555])), jnp.asarray(ids), jnp.full(2, seen))
        monkeypatch.setattr(shown, "drawn", lambda frozen, theta, pool, *args, drawn=drawn, **more: (drawn, pool))
        state, _ = setup(pipeline, ["star"], config)
        after, metrics = erase_step(dataclasses.replace(state, kappa=jnp.array([3.0])), frozen, config)
        np.testing.assert_allclose(after.kappa, [3.0 + context.RATE_SHOWN * seen], rtol=1e-6)
        assert metrics["left_in_context"] == seen
    first, second = goals
    words = encode(pipeline, ["dog", "dog star"])
    np.testing.assert_allclose(first.cond.embedding[0], words.embedding[1], atol=1e-5)
    # Latent 0 is in context, latent 1 is not.
    both = latents.Noised(jnp.stack([z[0], z[0]]), jnp.array([444, 444]))
    without, joined = predicted(frozen, frozen.unet, both, words)
    assert float(jnp.abs(joined - without).max()) > 1e-3
    np.testing.assert_allclose(second.eps[0] - first.eps[0], -3.0 * (joined - without), atol=1e-4)
    np.testing.assert_array_equal(second.eps[1], first.eps[1])


def test_more_concepts_than_a_pool_holds_are_refused():
    check_concepts(dataclasses.replace(CONFIG, steps=100), latents.MOST_CONCEPTS)
    with pytest.raises(AegisError, match="words.context=shown keeps trajectories of every concept, of at most 64; 65"):
        check_concepts(dataclasses.replace(CONFIG, steps=100), latents.MOST_CONCEPTS + 1)
