"""Random words, of which the step makes prompts to preserve and company for the concept. Part of aegis+, not of the
paper (docs/method.md).

  words.preserve   weight of L_p, the mean squared difference between theta's and theta0's predictions for random words,
                   at the latents and timesteps of the step. Like the paper's penalty on ||theta - theta0|| it needs no
                   data, but it knows which changes of the weights other prompts would notice. A share of these prompts
                   has no word: guidance subtracts the empty prompt's prediction from that of every other, and where
                   erasing has moved both away from the concept, that brings the concept back.
  words.context    for half of the latents the prompt that the concept is erased from is not the adversarial one but
                   the concept among these words (context.py). Otherwise a network may learn to withhold the concept
                   where it stands alone or behind a prefix, and draw it in a sentence.

The words are the tokenizer's, without those that mean the concept, which the text encoder tells.

Shapes: B latents, G concepts of the batch, L tokens, D text width, W words, K concepts.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import Conditioning, encode_ids, per_latent
from aegis_jax.erasure.programs import program
from aegis_jax.errors import AegisError

LONGEST = 6  # words of a random prompt
# Words that a run draws from, a random sample where the tokenizer has more: CLIP's has some 34,000, of which a run sees
# a few thousand, and to encode them all takes minutes on a CPU.
SAMPLE = 4096
# Settled on the embedded world (docs/study_first_reading.md), and only there.
EMPTY = 0.35  # share of the random prompts that have no word
SIMILAR = 0.6  # a word with a larger cosine to the concept, of encodings less all words' mean, is taken for a synonym
_AT_ONCE = 1024  # words encoded in one call


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "size", "concepts", "lengths", "near", "near_size", "odds"],
    meta_fields=["bos", "eos", "pad", "length", "near_share"],
)
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What random prompts are made of. Its shapes are the tokenizer's, whatever the concepts are: runs of different
    concepts share their programs, and may be lanes of one batch (erasure.lanes).

    Attributes:
      words: token ids of whole words, (W,) int32, of which the first `size`, an int32 scalar, count.
      concepts: the concepts' token ids, (K, L - 2) int32, of which the first `lengths` (K,) count.
      bos, eos, pad, length: special ids of the tokenizer, and the tokens of a prompt.
      near: words near to the concepts (near.py), (N,) int32, of which the first `near_size` count; of the prompts that
        have words `near_share` are one such word, if there is any. None: none is looked for.
      odds: the chance that a word, or one before it, is drawn for a place in a prompt, (W,) float32, ascending to 1.
        None: all have the same.
    """

    words: jax.Array
    size: jax.Array
    concepts: jax.Array
    lengths: jax.Array
    bos: int
    eos: int
    pad: int
    length: int
    near: jax.Array | None = None
    near_size: jax.Array | None = None
    near_share: float = 0.0
    odds: jax.Array | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["cond", "joined", "eps", "added"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Words:
    """The random prompts of a step, one for each of its latents.

    Attributes:
      cond: the words, B rows. joined: the same with a concept among them, or None.
      eps: theta0's predictions for the words, (B, h, w, C). added: what the concepts add to these, or None.
    """

    cond: Conditioning
    joined: Conditioning | None
    eps: jax.Array
    added: jax.Array | None


def vocabulary(tokenizer, text_graph, text_params, concepts: list[str], seed: int) -> Vocabulary:
    """`vocabularies` of a single run."""
    return vocabularies(tokenizer, text_graph, text_params, [concepts], seed)[0]


def vocabularies(tokenizer, text_graph, text_params, runs: list[list[str]], seed: int) -> list[Vocabulary]:
    """For each run's concepts whole words of the tokenizer (tokens that end a word), at most `SAMPLE` by `seed`, but
    those of the concepts.

    A word belongs to a concept if it is one of its tokens, or if the cosine of the two's encodings at the
    end-of-text token, less the mean of all words', is more than `SIMILAR`.

    Raises `AegisError` if no word is left, or the tokenizer has none.
    """
    ids = np.asarray(tokenizer.word_ids, np.int32)
    if len(ids) > SAMPLE:
        ids = np.sort(np.random.default_rng(seed).choice(ids, SAMPLE, replace=False))
    if len(ids) < 2:
        raise AegisError(
            f"the tokenizer has {len(ids)} whole words, too few for random prompts; set words.preserve=0 and "
            "words.context=none"
        )
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(text_params)):
        # `jax.eval_shape` asks for shapes, and these are the same whichever words are left out.
        return [_vocabulary(tokenizer, ids, [tokenizer.tokens(c) for c in run], len(ids)) for run in runs]
    states = partial(encodings, tokenizer, text_graph, text_params)
    word_states = states([[i] for i in ids], 3)
    centre = word_states.mean(0)
    tokens = [[tokenizer.tokens(concept) for concept in concepts] for concepts in runs]
    # Of the whole length, so that no run's encoding depends on how long another's is.
    all_named = _unit(states([row for named in tokens for row in named], tokenizer.model_max_length) - centre)
    found = []
    for named in tokens:
        mine, all_named = np.split(all_named, [len(named)])
        nearest = (_unit(word_states - centre) @ mine.T).max(1)
        kept = ids[(nearest <= SIMILAR) & ~np.isin(ids, [i for tokens in named for i in tokens])]
        found.append(_vocabulary(tokenizer, kept, named, len(ids)))
    return found


def _vocabulary(tokenizer, kept: np.ndarray, named: list[list[int]], most: int) -> Vocabulary:
    if not len(kept):
        raise AegisError(
            "every word of the tokenizer is too like the concepts for random prompts; set words.preserve=0 and "
            "words.context=none"
        )
    padded = np.zeros((len(named), tokenizer.model_max_length - 2), np.int32)
    for row, tokens in zip(padded, named):
        row[: len(tokens)] = tokens
    return Vocabulary(
        jnp.asarray(np.resize(kept, most)),
        jnp.int32(len(kept)),
        jnp.asarray(padded),
        jnp.asarray([len(tokens) for tokens in named], jnp.int32),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.model_max_length,
    )


def encodings(tokenizer, text_graph, text_params, rows: list[list[int]], length: int) -> np.ndarray:
    """The encodings (n, D) of token rows, each at its end-of-text token; what follows that cannot change them.

    length: of what is encoded, in tokens; BOS and EOS are two of them.
    """
    ids = np.full((len(rows), length), tokenizer.eos_token_id, np.int32)
    ends = np.array([len(row) + 1 for row in rows])
    for i, row in enumerate(rows):
        ids[i, : ends[i]] = [tokenizer.bos_token_id, *row]
    at_once, parts = min(_AT_ONCE, len(rows)), []
    for i in range(0, len(rows), at_once):
        some = np.resize(ids[i : i + at_once], (at_once, length))  # filled up, for one program
        states = encode_ids(text_graph, text_params, some).embedding
        parts.append(np.asarray(states[np.arange(at_once), np.resize(ends[i : i + at_once], at_once)]))
    return np.concatenate(parts)[: len(rows)]


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@program(static_argnames=("text_graph", "batch"))
def random_prompts(
    text_graph, text_params, vocabulary: Vocabulary, key, concepts=None, instead=None, *, batch: int
) -> Conditioning:
    """`random_ids`, encoded; instead: (which latents have others, (B,), token ids (2 B, L)), or None."""
    ids = random_ids(vocabulary, key, concepts, batch=batch)
    if instead is not None:
        which, others = instead
        ids = jnp.where(jnp.concatenate([which, which])[:, None], others, ids)
    return encode_ids(text_graph, text_params, ids)


def random_ids(vocabulary: Vocabulary, key, concepts=None, *, batch: int):
    """Token ids (B, L) of prompts of 1 to 6 words (fewer if no more fit), each drawn from the vocabulary, evenly or by
    its odds; a prompt has no word at all with probability `EMPTY`.

    concepts: indices into K, (G,); then 2 B rows, of which the second half are the prompts of the first with a concept
    put before, between or behind the words: that of latent i, at i mod G.
    """
    key_words, key_length, key_place, key_empty = jax.random.split(key, 4)
    place = jnp.arange(vocabulary.length, dtype=jnp.int32)
    # At least 1: setup refuses concepts that leave no room for soft tokens, of which there is one or more.
    room = vocabulary.length - 2 - (0 if concepts is None else jnp.max(vocabulary.lengths))
    count = jax.random.randint(key_length, (batch, 1), 1, jnp.minimum(LONGEST, room) + 1, jnp.int32)
    count = jnp.where(jax.random.bernoulli(key_empty, jnp.float32(EMPTY), (batch, 1)), 0, count)
    if vocabulary.odds is None:
        # Not jax.random.choice: with JAX_ENABLE_X64 that draws other words, by integers of 64 bits.
        which = jax.random.randint(key_words, (batch, vocabulary.length), 0, vocabulary.size, jnp.int32)
    else:
        uniform = jax.random.uniform(key_words, (batch, vocabulary.length), jnp.float32)
        which = jnp.searchsorted(vocabulary.odds, uniform, side="right").clip(0, vocabulary.size - 1)
    drawn = vocabulary.words[which]  # at 1..count
    if vocabulary.near is not None:
        key_near, key_word = jax.random.split(jax.random.fold_in(key, 4))
        one = jax.random.randint(key_word, (batch, 1), 0, jnp.maximum(vocabulary.near_size, 1), jnp.int32)
        near = (count > 0) & (vocabulary.near_size > 0)
        near &= jax.random.bernoulli(key_near, jnp.float32(vocabulary.near_share), (batch, 1))
        drawn, count = jnp.where(near, vocabulary.near[one], drawn), jnp.where(near, 1, count)
    ids = _closed(vocabulary, drawn, count)
    if concepts is not None:
        before = jax.random.randint(
            key_place, (batch, 1), 0, count + 1, jnp.int32
        )  # words that the concept comes after
        mine = per_latent(concepts, batch)
        tokens, length = vocabulary.concepts[mine], vocabulary.lengths[mine][:, None]
        at = place - 1 - before  # position in the concept, if in 0..length - 1
        moved = jnp.take_along_axis(drawn, jnp.where(at < 0, place, place - length), 1)
        inside = jnp.take_along_axis(tokens, jnp.clip(at, 0, tokens.shape[1] - 1), 1)
        joined = jnp.where((at >= 0) & (at < length), inside, moved)
        ids = jnp.concatenate([ids, _closed(vocabulary, joined, count + length)])
    return ids


def _closed(vocabulary: Vocabulary, ids, count):
    """BOS, the ids at 1..count, EOS and padding."""
    place = jnp.arange(vocabulary.length, dtype=jnp.int32)
    after = jnp.where(place == count + 1, vocabulary.eos, vocabulary.pad)
    return jnp.where(place == 0, vocabulary.bos, jnp.where(place <= count, ids, after))
