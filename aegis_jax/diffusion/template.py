"""Prompts with gaps for learnt tokens, which enter before position embeddings and the text encoder.

Shapes: R prompts, K soft tokens, L tokens, d token width.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from aegis_jax.errors import AegisError


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt with gaps for soft tokens, enough to replay it anywhere.

    Attributes:
      ids: token ids (L,), padded as the tokenizer pads; EOS where a soft token goes.
      slots: (L,), the number of the soft token that stands at a position, -1 where the id's own embedding does.
    """

    ids: np.ndarray
    slots: np.ndarray


def padded(tokenizer, said: list[int | None]) -> Template:
    """The template of a prompt's tokens, None where a learnt token goes."""
    row = [tokenizer.bos_token_id, *said, tokenizer.eos_token_id]
    row += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row))
    gap = np.array([token is None for token in row])
    ids = np.array([tokenizer.eos_token_id if token is None else token for token in row], np.int32)
    return Template(ids, np.where(gap, np.cumsum(gap) - 1, -1).astype(np.int32))


def around(tokenizer, text: str, tokens: int) -> Template:
    """The template of `tokens` learnt tokens where a text has "{}". Raises `AegisError` for what does not fit."""
    before, behind = (tokenizer.tokens(part) for part in text.split("{}"))
    if len(before) + tokens + len(behind) + 2 > tokenizer.model_max_length:
        raise AegisError(
            f"{text!r} with {tokens} learnt tokens exceeds the {tokenizer.model_max_length} positions of the text "
            "encoder; use fewer"
        )
    return padded(tokenizer, [*before, *[None] * tokens, *behind])


def fill(tokens, slots, soft):
    """Token embeddings (R, L, d) with the soft tokens (R, K, d) put where `slots` (R, L) says."""
    chosen = jnp.take_along_axis(soft, jnp.maximum(slots, 0)[..., None], axis=1)
    return jnp.where(slots[..., None] >= 0, chosen, tokens)
