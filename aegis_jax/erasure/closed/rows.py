"""Texts as rows of text embeddings, the input of every key and value projection: float64 NumPy, on the host.

d: width of the text embedding. L: tokens of a prompt.
"""

import dataclasses
import itertools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from aegis_jax.diffusion.conditioning import PROMPTS_PER_CALL, encode, encode_ids
from aegis_jax.erasure.networks import with_text_in_float32
from aegis_jax.erasure.texts import check_text_width, concept_tokens, folded
from aegis_jax.errors import AegisError
from aegis_jax.models.model import full_precision


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A text: its embedding (L, d), float64, and the place of its last token; of an empty text that is BOS, 0."""

    embedding: np.ndarray
    last: int

    def rows(self, tokens: str) -> np.ndarray:
        """The rows meant by `tokens` (config.TOKENS)."""
        first, end = {"last": (self.last, self.last + 1), "from_last": (self.last, None), "all": (0, None)}[tokens]
        return self.embedding[first:end]


def encoded(pipeline, texts: Iterable[str]) -> dict[str, Encoded]:
    """Each text once, by the pipeline's text encoder in float32 at full precision.

    Raises `AegisError` if UNet and text encoder do not belong together, or the embeddings are not finite.
    """
    texts = list(dict.fromkeys(texts))
    check_text_width(pipeline.unet.config, pipeline.text_encoder.params)
    with full_precision(jnp.float32):
        found = np.asarray(encode(with_text_in_float32(pipeline), texts).embedding, np.float64)
    if not np.isfinite(found).all():
        raise AegisError("text_encoder: its embeddings are not finite; load the model in float32, or check its file")
    last = [len(pipeline.tokenizer.tokens(text)) for text in texts]
    return {text: Encoded(rows, place) for text, rows, place in zip(texts, found, last)}


def moment_of_words(pipeline, count: int, seed: int) -> np.ndarray:
    """Mean of x'x (d, d) over the tokens, padding left out, of prompts of one of `count` whole words each, drawn from
    the tokenizer's; all of them, where it has fewer."""
    tokenizer, encoder = pipeline.tokenizer, with_text_in_float32(pipeline).text_encoder
    words = np.random.default_rng(seed).permutation(tokenizer.word_ids)[:count]
    width = encoder.params["text_model"]["final_layer_norm"]["bias"].shape[0]
    total, length = np.zeros((width, width)), tokenizer.model_max_length
    for some in np.split(words, range(PROMPTS_PER_CALL, len(words), PROMPTS_PER_CALL)):
        ids = np.full((PROMPTS_PER_CALL, length), tokenizer.pad_token_id, np.int32)
        ids[:, 0], ids[: len(some), 1], ids[:, 2] = tokenizer.bos_token_id, some, tokenizer.eos_token_id
        with full_precision(jnp.float32):
            found = encode_ids(encoder.graph, encoder.params, ids).embedding
        rows = np.asarray(found, np.float64)[: len(some), :3].reshape(-1, width)
        total += rows.T @ rows
    return total / max(1, 3 * len(words))


def check_texts(tokenizer, concepts: list[str], guide: Iterable[str], preserve: Iterable[str]) -> None:
    """Raises `AegisError` for a text that is none, or cannot be encoded whole, and for ones that contradict."""
    if not concepts:
        raise AegisError("no concept given; name at least one, such as 'star'")
    for concept in concepts:
        concept_tokens(tokenizer, concept)
    if len(guide) not in (1, len(concepts)):
        raise AegisError(f"guide names {len(guide)} texts for {len(concepts)} concepts; give one, or one for each")
    for key, text in [("guide", text) for text in guide] + [("preserve", text) for text in preserve]:
        count, room = len(tokenizer.tokens(text)), tokenizer.model_max_length - 2
        if text.strip() and not count:
            raise AegisError(f"{key}: {text!r} has no tokens in this tokenizer; choose another wording")
        if count > room:
            raise AegisError(
                f"{key}: {text[:40]!r} has {count} tokens, the text encoder has room for {room}; shorten it"
            )
    said = {folded(concept) for concept in concepts}
    both = [text for text in preserve if folded(text) in said]
    if both:
        raise AegisError(f"preserve names {both[0]!r}, which is to be erased; leave it out of one of the two")


def erased_and_goals(
    texts: dict[str, Encoded], concepts: list[str], guide: Iterable[str], tokens: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each concept its rows (n, d) and those of its guide that they are to become, cut to the shorter."""
    guides = itertools.cycle(guide) if len(guide) == 1 else guide
    pairs = [(texts[concept].rows(tokens), texts[goal].rows(tokens)) for concept, goal in zip(concepts, guides)]
    return [(c[: len(g)], g[: len(c)]) for c, g in pairs]
