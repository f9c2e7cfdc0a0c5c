"""Where soft tokens stand among the words of an attack's prompt.

  before    [BOS, p, concept, EOS]
  behind    [BOS, concept, p, EOS]
  alone     [BOS, p, EOS]: textual inversion
  neutral   [BOS, p, neutral word, EOS]: the concept's place is taken, but not named

Shapes: R prompts, K soft tokens, L tokens, d token width.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from aegis_jax.errors import AegisError

PLACES = ("before", "behind", "alone", "neutral")


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt with gaps for soft tokens, enough to replay it anywhere.

    Attributes:
      ids: token ids (L,), padded as the tokenizer pads; EOS where a soft token goes.
      slots: (L,), the number of the soft token that stands at a position, -1 where the id's own embedding does.
    """

    ids: np.ndarray
    slots: np.ndarray


def template(tokenizer, concept: str, place: str, tokens: int, neutral: str = "thing") -> Template:
    """The template of `tokens` soft tokens at a `place` of PLACES.

    Raises `AegisError` for an unknown place, a concept without tokens, a neutral word that is not one token of the
    vocabulary, and what does not fit the text encoder.
    """
    if place not in PLACES:
        raise AegisError(f"attack soft_prompt: place={place!r} is unknown; choose one of: {', '.join(PLACES)}")
    length, gaps = tokenizer.model_max_length, [None] * tokens
    words = _neutral(tokenizer, neutral) if place == "neutral" else tokenizer.tokens(concept)
    if not words:
        raise AegisError(f"concept {concept!r} has no tokens in this tokenizer; choose another wording")
    if place == "alone":
        words = []
    if len(words) + tokens + 2 > length:
        raise AegisError(
            f"concept {concept[:40]!r} ({len(words)} tokens) and {tokens} soft tokens exceed the "
            f"{length} positions of the text encoder; use fewer soft tokens"
        )
    said = words + gaps if place == "behind" else gaps + words
    row = [tokenizer.bos_token_id, *said, tokenizer.eos_token_id]
    row += [tokenizer.pad_token_id] * (length - len(row))
    gap = np.array([token is None for token in row])
    ids = np.array([tokenizer.eos_token_id if token is None else token for token in row], np.int32)
    return Template(ids, np.where(gap, np.cumsum(gap) - 1, -1).astype(np.int32))


def _neutral(tokenizer, word: str) -> list[int]:
    ids = tokenizer.tokens(word)
    if len(ids) != 1 or ids[0] not in tokenizer.word_ids:
        raise AegisError(
            f"attack soft_prompt: neutral={word!r} is not one whole word of this tokenizer; choose a common noun of it"
        )
    return ids


def fill(tokens, slots, soft):
    """Token embeddings (R, L, d) with the soft tokens (R, K, d) put where `slots` (R, L) says."""
    chosen = jnp.take_along_axis(soft, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where(slots[..., None] >= 0, chosen, tokens)
