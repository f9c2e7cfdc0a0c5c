"""Preservation: what prompts of random words draw stays as it was. Not in the paper (docs/decisions.md).

L_p is the mean squared difference between theta's and theta0's predictions for such prompts, at the latents and
timesteps of the step. Like the paper's penalty on ||theta - theta0|| it needs no data, but it knows which changes of
the weights other prompts would notice. The words are the tokenizer's, without those that mean the concept, which the
text encoder tells.

Shapes: B latents, L tokens, D text width, W words.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.sample import encode_ids
from aegis_jax.errors import AegisError

_LONGEST = 6  # words of a random prompt
_AT_ONCE = 1024  # words encoded in one call


@partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["bos", "eos", "pad", "length"])
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What random prompts are made of.

    Attributes:
      words: token ids of whole words, (W,) int32.
      bos, eos, pad, length: special ids of the tokenizer, and the tokens of a prompt.
    """

    words: jax.Array
    bos: int
    eos: int
    pad: int
    length: int


def vocabulary(tokenizer, text_graph, text_params, concepts: list[str], similar: float) -> Vocabulary:
    """The tokenizer's whole words (tokens that end a word) but those of the concepts.

    A word belongs to a concept if it is one of its tokens, or if the cosine of the two's encodings at the
    end-of-text token, less the mean of all words', is more than `similar`.

    Raises `AegisError` if no word is left, or the tokenizer has none. Every word is encoded once, in prompts of three
    tokens; how long that takes with CLIP's tens of thousands has not been measured.
    """
    ids = np.asarray(tokenizer.word_ids, np.int32)
    named = [tokenizer.tokens(concept) for concept in concepts]
    states = partial(_states, tokenizer, text_graph, text_params)
    if len(ids) < 2:
        raise AegisError(f"the tokenizer has {len(ids)} whole words, too few to preserve; set preserve.weight=0")
    words, concept_states = states([[i] for i in ids]), states(named)
    centre = words.mean(0)
    nearest = (_unit(words - centre) @ _unit(concept_states - centre).T).max(1)
    kept = ids[(nearest <= similar) & ~np.isin(ids, [i for tokens in named for i in tokens])]
    if not len(kept):
        raise AegisError(f"preserve.similar={similar} leaves no word to preserve; choose a larger one")
    return Vocabulary(
        jnp.asarray(kept),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.model_max_length,
    )


def _states(tokenizer, text_graph, text_params, rows: list[list[int]]) -> np.ndarray:
    """The encodings (n, D) of token rows, each at its end-of-text token; what follows that cannot change them."""
    longest = max(map(len, rows)) + 2
    ids = np.full((len(rows), longest), tokenizer.eos_token_id, np.int32)
    ends = np.array([len(row) + 1 for row in rows])
    for i, row in enumerate(rows):
        ids[i, : ends[i]] = [tokenizer.bos_token_id, *row]
    at_once, parts = min(_AT_ONCE, len(rows)), []
    for i in range(0, len(rows), at_once):
        some = np.resize(ids[i : i + at_once], (at_once, longest))  # filled up, for one program
        states = encode_ids(text_graph, text_params, some)
        parts.append(np.asarray(states[np.arange(at_once), np.resize(ends[i : i + at_once], at_once)]))
    return np.concatenate(parts)[: len(rows)]


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames=("text_graph", "batch"))
def random_prompts(text_graph, text_params, vocabulary: Vocabulary, key, *, batch: int):
    """Encodings (B, L, D) of prompts of 1 to 6 words (fewer if no more fit), each drawn evenly from the vocabulary."""
    key_words, key_length = jax.random.split(key)
    place = jnp.arange(vocabulary.length)
    longest = min(_LONGEST, vocabulary.length - 2)
    count = jax.random.randint(key_length, (batch, 1), 1, longest + 1)
    drawn = jax.random.choice(key_words, vocabulary.words, (batch, vocabulary.length))
    after = jnp.where(place == count + 1, vocabulary.eos, vocabulary.pad)
    ids = jnp.where(place == 0, vocabulary.bos, jnp.where(place <= count, drawn, after))
    return encode_ids(text_graph, text_params, ids)
