"""The canvas's tokenizer: CLIP's own merges, a subset (merges.txt, made by tools/canvas/merges.py).

Words fall into tokens as CLIP's do, but ids are the canvas's own: 512 byte symbols, merges, the two special tokens.
"""

import functools
import pathlib

import numpy as np

from aegis_jax.world.tokenizer import BOS, EOS, MAX_LENGTH, apply, byte_symbols, write_files

MERGES = pathlib.Path(__file__).parent / "merges.txt"


@functools.cache
def merges() -> dict[tuple[str, str], int]:
    """{pair: rank}, in CLIP's order."""
    lines = MERGES.read_text("utf-8").splitlines()[1:]
    return {tuple(line.split()): rank for rank, line in enumerate(lines)}


@functools.cache
def vocabulary() -> dict[str, int]:
    """{token: id}, laid out as CLIP's."""
    alphabet = byte_symbols()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges()), BOS, EOS]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def write(folder: pathlib.Path) -> None:
    """Write the files of a CLIPTokenizer into `folder`."""
    write_files(folder, vocabulary(), list(merges()))


@functools.cache
def _ids(word: str) -> tuple[int, ...]:
    return tuple(vocabulary()[piece] for piece in apply([*word[:-1], word[-1] + "</w>"], merges()))


def encode(captions: list[str]) -> np.ndarray:
    """Token ids (n, MAX_LENGTH) int32 of captions of plain lower-case words, as the CLIPTokenizer gives them."""
    vocab = vocabulary()
    ids = np.full((len(captions), MAX_LENGTH), vocab[EOS], np.int32)
    for row, caption in zip(ids, captions, strict=True):
        tokens = [vocab[BOS], *(i for word in caption.split() for i in _ids(word))][: MAX_LENGTH - 1]
        row[: len(tokens)] = tokens
    return ids


def longest(words, per_caption: int) -> int:
    """Tokens that a caption of `per_caption` of these words has at most, the special ones included: two of its words,
    a thing's and a style's, may be several tokens."""
    lengths = sorted((len(_ids(word)) for word in words), reverse=True)
    return sum(lengths[:2]) + per_caption - 2 + 2
