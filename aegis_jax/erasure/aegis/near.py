"""Which words draw what the concept draws, in part (`words.near`). Part of aegis+, not of the paper (docs/method.md).

At a noisy t a prompt w adds d_w = eps0(z_t, w) - eps0(z_t, c_0) to what theta0 predicts, and a word is near to the
concept c by <d_w, d_c> / <d_c, d_c>, the share of what the concept adds that the word adds too. An erasure that pushes
theta away from the concept pushes it away from these words first, so more of them is preserved. Their text encodings do
not tell: those of CLIP hold apart what is to be told apart, and the canvas's has wine and helicopters beside the fox,
where what the UNet draws is a cat, a mammal, a pizza.

Shapes: W words, K concepts, N = h w C latent elements.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import Conditioning, encode_ids, join
from aegis_jax.erasure.aegis.words import Vocabulary
from aegis_jax.erasure.latents import Noised
from aegis_jax.erasure.networks import SETUP, Networks, predicted

NEAR = 128  # words that count as near
SYNONYM = 0.9  # a word whose d has a larger cosine to the concept's is taken for the concept
NOISY = 0.8  # t, of the schedule's timesteps: the latent is noise, and what the picture shows is decided
_AT_ONCE = 8  # prompts in one call of the UNet


def with_near(net: Networks, vocabularies: list[Vocabulary], concepts: list[Conditioning], share: float, seed: int):
    """The vocabularies of runs, each with the `NEAR` of its words that are nearest to any of the run's concepts (K
    rows), of which `share` of its prompts with words are made. `Networks` not yet placed."""
    ends = np.cumsum([len(rows.embedding) for rows in concepts])[:-1]
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(net.unet)):
        # `jax.eval_shape` asks for shapes.
        return [_with(known, np.asarray(known.words.shape[0] * [0], np.int32), share) for known in vocabularies]
    words = np.unique(np.concatenate([_words(known) for known in vocabularies]))
    dots, norms, own = _added(net, vocabularies[0], words, join(*concepts), seed)
    shares = np.split(dots / np.maximum(own**2, 1e-12), ends, axis=1)
    cosines = np.split(dots / np.maximum(norms[:, None] * own, 1e-12), ends, axis=1)
    found = []
    for known, by_share, cosine in zip(vocabularies, shares, cosines):
        mine = np.isin(words, _words(known)) & (by_share.max(1) > 0) & (cosine.max(1) <= SYNONYM)
        order = np.argsort(-by_share.max(1), kind="stable")
        found.append(_with(known, words[order[mine[order]]], share))
    return found


def _words(known: Vocabulary) -> np.ndarray:
    return np.asarray(known.words[: int(known.size)])


def _with(known: Vocabulary, nearest: np.ndarray, share: float) -> Vocabulary:
    """No word near: all of the vocabulary are as near."""
    nearest = (nearest if len(nearest) else _words(known))[:NEAR]
    filled = np.resize(nearest, min(NEAR, len(known.words))).astype(np.int32)
    return dataclasses.replace(known, near=jnp.asarray(filled), near_size=jnp.int32(len(nearest)), near_share=share)


def _added(net: Networks, known: Vocabulary, words: np.ndarray, concepts: Conditioning, seed: int):
    """(<d_w, d_c> (W, K), ||d_w|| (W,), ||d_c|| (K,))."""
    z = jax.random.normal(jax.random.fold_in(jax.random.key(seed), SETUP - 1), (1, *net.latent_shape), jnp.float32)
    t = int(NOISY * len(net.schedule.alphas_cumprod))
    at = Noised(jnp.repeat(z, _AT_ONCE, 0), jnp.full(_AT_ONCE, t, jnp.int32))

    def parts(count, rows):
        """(i, eps of rows i to i + `_AT_ONCE`, (n, N)); rows: of indices, the conditioning."""
        for i in range(0, count, _AT_ONCE):
            some = rows(np.minimum(np.arange(i, i + _AT_ONCE), count - 1))
            yield np.asarray(predicted(net, at, some), np.float32).reshape(_AT_ONCE, -1)[: count - i]

    prompts = np.full((len(words), known.length), known.pad, np.int32)
    prompts[:, 0], prompts[:, 1], prompts[:, 2] = known.bos, words, known.eos
    named = join(net.empty_emb, concepts)
    empty, mine = np.split(
        np.concatenate(list(parts(len(named.embedding), lambda i: jax.tree.map(lambda x: x[i], named)))), [1]
    )
    mine = mine - empty
    alone = parts(len(words), lambda i: encode_ids(net.text_graph, net.text, prompts[i]))
    dots, norms = zip(*((d @ mine.T, np.linalg.norm(d, axis=1)) for d in (eps - empty for eps in alone)))
    return np.concatenate(dots), np.concatenate(norms), np.linalg.norm(mine, axis=1)
