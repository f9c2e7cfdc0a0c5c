"""CLIPTokenizer files for the world's own small vocabulary: every caption word is one token
`word</w>`.

All 256 byte symbols are in the vocabulary too, so any text tokenises (an unknown word into
letters).
"""

import json
import pathlib

MAX_LENGTH = 24  # BOS + longest caption (11 words) + EOS leaves 11 for soft tokens; short saves attention
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The printable character standing for each byte, in GPT-2's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(rest))]


def apply(pieces: list[str], ranks: dict[tuple[str, str], int], seen=None) -> list[str]:
    """A word's pieces put together by the merges of lowest rank first; `seen` is told of each that is used."""
    while len(pieces) > 1:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False))]
        rank, i = min(pairs)
        if rank == len(ranks):
            break
        if seen is not None:
            seen((pieces[i], pieces[i + 1]))
        pieces = pieces[:i] + [pieces[i] + pieces[i + 1]] + pieces[i + 2 :]
    return pieces


def build(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) under which each of `words` is a single token.

    Merges are added word by word with growing rank: BPE applies low ranks first, so a later merge
    cannot break a word that is already whole.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = apply([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = apply(pieces, ranks)
    alphabet = byte_symbols()
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in ranks] + [BOS, EOS]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, list(ranks)


def write(folder: pathlib.Path, words: list[str]) -> None:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json into
    `folder`.
    """
    write_files(folder, *build(words))


def write_files(folder: pathlib.Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """The four files for a vocabulary and its merges."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def encode(captions: list[str], vocab: dict[str, int]):
    """Token ids (n, MAX_LENGTH) of captions made of whole vocabulary words, as the CLIPTokenizer
    gives them.

    Training needs no tokenizer library this way; a test holds it against transformers.
    """
    import numpy as np

    ids = np.full((len(captions), MAX_LENGTH), vocab[EOS], np.int32)
    for row, caption in zip(ids, captions, strict=True):
        tokens = [vocab[BOS], *(vocab[word + "</w>"] for word in caption.split())]
        row[: len(tokens)] = tokens
    return ids
