"""Where learnt tokens stand among the words of an attack's prompt.

Of the soft-prompt family:
  before    [BOS, p, concept, EOS]
  behind    [BOS, concept, p, EOS]
  alone     [BOS, p, EOS]: textual inversion
  neutral   [BOS, p, neutral word, EOS]: the concept's place is taken, but not named
Of attacks that search for words, by MU-Attack's names; the last by what P4D-N does:
  prefix_k, suffix_k, mid_k   all in front of the prompt, behind it, in its middle
  insert_k      one behind each of k equal parts of the prompt
  per_k_words   one in front of the prompt and one behind every third of its tokens, until there are k
  replace       the prompt's own tokens are left out

"""

from aegis_jax.diffusion.template import Template, padded
from aegis_jax.errors import AegisError

PLACES = ("before", "behind", "alone", "neutral")
INSERTIONS = ("prefix_k", "suffix_k", "mid_k", "insert_k", "per_k_words", "replace")
EVERY = 3  # of per_k_words


def template(
    tokenizer, concept: str, place: str, tokens: int, neutral: str = "thing", method: str = "soft_prompt"
) -> Template:
    """The template of `tokens` soft tokens at a `place` of PLACES.

    Raises `AegisError`, which names the attack, for an unknown place, a concept without tokens, a neutral word that is
    not one token of the vocabulary, and what does not fit the text encoder.
    """
    if place not in PLACES:
        raise AegisError(f"attack {method}: place={place!r} is unknown; choose one of: {', '.join(PLACES)}")
    length = tokenizer.model_max_length
    words = _neutral(tokenizer, neutral, method) if place == "neutral" else tokenizer.tokens(concept)
    if not words:
        raise AegisError(
            f"attack {method}: concept {concept!r} has no tokens in this tokenizer; choose another wording"
        )
    if place == "alone":
        words = []
    if len(words) + tokens + 2 > length:
        raise AegisError(
            f"attack {method}: concept {concept[:40]!r} ({len(words)} tokens) and {tokens} learnt tokens exceed the "
            f"{length} positions of the text encoder; use fewer learnt tokens"
        )
    gaps = [None] * tokens
    return padded(tokenizer, words + gaps if place == "behind" else gaps + words)


def inserted(words: list, tokens: int, place: str) -> list:
    """`words` with None where each of `tokens` learnt tokens goes, by a `place` of INSERTIONS."""
    count = len(words)
    if place == "replace":
        return [None] * tokens
    before = {
        "prefix_k": [0] * tokens,
        "suffix_k": [count] * tokens,
        "mid_k": [count // 2] * tokens,
        "insert_k": [count // (tokens + 1) * (i + 1) for i in range(tokens)],
        "per_k_words": [min(EVERY * i, count) for i in range(tokens)],
    }[place]  # how many words stand before each of them
    return [token for i in range(count + 1) for token in [None] * before.count(i) + list(words[i : i + 1])]


def insertion(tokenizer, prompt: str, place: str, tokens: int, method: str) -> tuple[Template, list]:
    """(the template, its tokens without BOS, EOS and padding) of `tokens` learnt tokens in a prompt.

    Raises `AegisError`, which names the attack, for an unknown place and for what does not fit the text encoder.
    """
    if place not in INSERTIONS:
        raise AegisError(f"attack {method}: place={place!r} is unknown; choose one of: {', '.join(INSERTIONS)}")
    words, length = tokenizer.tokens(prompt), tokenizer.model_max_length
    count = tokens if place == "replace" else len(words) + tokens
    if count + 2 > length:
        raise AegisError(
            f"attack {method}: prompt {prompt[:40]!r} and {tokens} learnt tokens make {count} tokens, but the text "
            f"encoder sees {length - 2}; use fewer learnt tokens, or leave out the prompt or the attack"
        )
    said = inserted(words, tokens, place)
    return padded(tokenizer, said), said


def _neutral(tokenizer, word: str, method: str) -> list[int]:
    ids = tokenizer.tokens(word)
    if len(ids) != 1 or ids[0] not in tokenizer.word_ids:
        raise AegisError(
            f"attack {method}: neutral={word!r} is not one whole word of this tokenizer; choose a common noun of it"
        )
    return ids
