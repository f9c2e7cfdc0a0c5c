"""What words draw, and which draw what the concept draws, in part. Of `aegis+near`, not of the paper (docs/method.md).

At a noisy t a prompt w adds d_w = eps0(z_t, w) - eps0(z_t, c_0) to what theta0 predicts, and a word is near to the
concept c by <d_w, d_c> / <d_c, d_c>, the share of what the concept adds that the word adds too. An erasure that pushes
theta away from the concept pushes it away from these words first, so more of them is preserved. Their text encodings do
not tell: the canvas's text encoder, trained to hold apart what is to be told apart, has wine and helicopters beside the
fox, where what the UNet draws is a cat, a mammal, a pizza.

Most words of a tokenizer draw next to nothing. Of all others than the near ones each is drawn for a random prompt with
odds of ||d_w||^3: what can be hurt is what is drawn.

It takes a forward pass for every word, before the first step; `UNet evaluations a step` does not count it.

Shapes: W words, K concepts, N = h w C latent elements.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import Conditioning, encode_ids, join
from aegis_jax.erasure.aegis.words import Vocabulary
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.networks import SETUP, Networks, predicted
from aegis_jax.errors import AegisError

# Taken once, not tuned.
NEAR = 128  # words that count as near
SYNONYM = 0.9  # a word whose d has a larger cosine to the concept's is taken for the concept
NOISY = 0.8  # t, of the schedule's timesteps: the latent is noise, and what the picture shows is decided


def with_drawn(net: Networks, vocabularies: list[Vocabulary], concepts: list[Conditioning], words, *, seed, batch: int):
    """The vocabularies of runs, each with the `NEAR` of its words that are nearest to its concepts (K rows), which take
    turns, and the odds of all of them.

    words: the settings (config.DrawnWordsConfig). net: with a UNet in float32, since d is a small difference, and not
    yet placed. batch: prompts in one call of it.
    Raises `AegisError` for predictions that are not finite.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(net.unet)):
        # `jax.eval_shape` asks for shapes.
        count = len(vocabularies[0].words)
        return [_with(known, np.zeros(count, np.int32), np.zeros(count), words) for known in vocabularies]
    ids = np.unique(np.concatenate([_words(known) for known in vocabularies]))
    dots, norms, own = _added(net, vocabularies[0], ids, join(*concepts), seed, batch)
    ends = np.cumsum([len(rows.embedding) for rows in concepts])[:-1]
    shares = np.split(dots / np.maximum(own**2, 1e-12), ends, axis=1)
    cosines = np.split(dots / np.maximum(norms[:, None] * own, 1e-12), ends, axis=1)
    found = []
    for known, *both in zip(vocabularies, shares, cosines):
        mine = _words(known)
        found.append(_with(known, _nearest(ids, np.isin(ids, mine), *both), norms[np.searchsorted(ids, mine)], words))
    return found


def _words(known: Vocabulary) -> np.ndarray:
    return np.asarray(known.words[: int(known.size)])


def _nearest(words: np.ndarray, mine: np.ndarray, share: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Those of the words (W,) that are `mine` (W,) and no concept's synonym: the nearest of each concept, the second
    nearest of each, and so on. share, cosine: (W, K)."""
    mine = mine & (cosine.max(1) <= SYNONYM)
    ranked = ([i for i in np.argsort(-each, kind="stable") if mine[i] and each[i] > 0] for each in share.T)
    dealt = itertools.chain.from_iterable(itertools.zip_longest(*ranked))
    return words[list(dict.fromkeys(i for i in dealt if i is not None))[:NEAR]]


def _with(known: Vocabulary, nearest: np.ndarray, norms: np.ndarray, words) -> Vocabulary:
    """norms: of what the vocabulary's words draw, (size,)."""
    filled = np.resize(nearest if len(nearest) else known.bos, min(NEAR, len(known.words))).astype(np.int32)
    count = jnp.int32(min(len(nearest), len(filled)))
    odds = np.full(len(known.words), 1.0, np.float32)  # behind the words that count: never drawn
    odds[: len(norms)] = _cumulated(norms.astype(np.float64) ** words.power)
    return dataclasses.replace(
        known, near=jnp.asarray(filled), near_size=count, near_share=words.near, odds=jnp.asarray(odds)
    )


def _cumulated(weights: np.ndarray) -> np.ndarray:
    total = np.cumsum(weights)
    return total / total[-1] if total[-1] > 0 else np.arange(1, len(weights) + 1) / len(weights)


def _added(net: Networks, known: Vocabulary, words: np.ndarray, concepts: Conditioning, seed: int, batch: int):
    """(<d_w, d_c> (W, K), ||d_w|| (W,), ||d_c|| (K,))."""
    z = jax.random.normal(jax.random.fold_in(jax.random.key(seed), SETUP - 1), (1, *net.latent_shape), jnp.float32)
    t = int(NOISY * len(net.schedule.alphas_cumprod))
    at = Noised(jnp.repeat(z, batch, 0), jnp.full(batch, t, jnp.int32))

    def parts(count, rows):
        """eps of `batch` rows after another, (n, N); rows: of indices, the conditioning."""
        for i in range(0, count, batch):
            some = rows(np.minimum(np.arange(i, i + batch), count - 1))
            yield np.asarray(predicted(net, at, some), np.float32).reshape(batch, -1)[: count - i]

    prompts = np.full((len(words), known.length), known.pad, np.int32)
    prompts[:, 0], prompts[:, 1], prompts[:, 2] = known.bos, words, known.eos
    named = join(net.empty_emb, concepts)
    of_named = list(parts(len(named.embedding), lambda i: jax.tree.map(lambda x: x[i], named)))
    empty, mine = np.split(np.concatenate(of_named), [1])
    mine = mine - empty
    alone = parts(len(words), lambda i: encode_ids(net.text_graph, net.text, prompts[i]))
    dots, norms = zip(*((d @ mine.T, np.linalg.norm(d, axis=1)) for d in (eps - empty for eps in alone)))
    found = np.concatenate(dots), np.concatenate(norms), np.linalg.norm(mine, axis=1)
    if not all(np.isfinite(x).all() for x in found):
        raise AegisError("the model's predictions for single words are not finite; check its weights (aegis verify)")
    return found
