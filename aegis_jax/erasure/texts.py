"""What every method asks of the texts that it is given, before it encodes them."""

import re
from collections.abc import Iterable

from aegis_jax.diffusion.sample import text_widths
from aegis_jax.errors import AegisError

_ARTICLES = {"a", "an", "the", "of"}


def concept_tokens(tokenizer, concept: str, slots: int = 0) -> list[int]:
    """The token ids of what is to be erased. slots: positions of the prompt that it has to leave free.

    Raises `AegisError` for an empty concept, and for one that has no tokens or too many.
    """
    if not isinstance(concept, str) or not concept.strip():
        raise AegisError(f"concept {concept!r} is empty; give the concept's name, such as 'star'")
    tokens = tokenizer.tokens(concept)
    if not tokens:
        raise AegisError(f"concept {concept!r} has no tokens in this tokenizer; choose another wording")
    room = tokenizer.model_max_length - 2 - slots
    if len(tokens) > room:
        besides = f"BOS, EOS and {slots} soft tokens" if slots else "BOS and EOS"
        raise AegisError(
            f"concept {concept[:40]!r} has {len(tokens)} tokens, but the text encoder has room for {room} besides "
            f"{besides}; shorten it"
        )
    return tokens


def folded(text: str) -> str:
    """A text as CLIP's tokenizers read it: whatever the case, and the number of spaces."""
    return " ".join(text.lower().split())


def check_text_width(config: dict, text_params) -> None:
    """Raises `AegisError` if a UNet of that config.json takes text of another width than the text encoder's."""
    wanted = config.get("cross_attention_dim", 1280)
    found = text_params["text_model"]["final_layer_norm"]["bias"].shape[0]
    if text_widths(config) - {found}:
        raise AegisError(
            f"unet/config.json: cross_attention_dim={wanted} but the text encoder's hidden_size is {found}; UNet and "
            "text encoder do not belong together"
        )


def naming(concept: str) -> re.Pattern:
    """Finds a concept in texts, in whatever case, as words of its own: no "cat" in "category".

    Names in letters beyond ASCII are found anywhere: their script may have no spaces.
    """
    edges = (r"(?<!\w)", r"(?!\w)") if concept.isascii() else ("", "")
    return re.compile(re.escape(concept.strip()).join(edges), re.IGNORECASE)


def known(tokenizer, texts: Iterable[str], apart_from: Iterable[str] = ()) -> list[str]:
    """Those of `texts` whose words are one token each, and none a word of `apart_from`; "{}" may stand among them.

    For defaults that are to suit any model: a small one spells what it has never seen.
    """
    said = set(" ".join(apart_from).lower().split()) - _ARTICLES

    def fits(word: str) -> bool:
        return word == "{}" or (word.lower() not in said and len(tokenizer.tokens(word)) == 1)

    return [text for text in texts if all(map(fits, text.split()))]
