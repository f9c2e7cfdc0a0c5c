"""Writes aegis_jax/canvas/merges.txt: `python -m tools.canvas.merges`, where open_clip_torch is installed.

CLIP's own merges in their own order, but only those that the words of captions, of emojibase's tags, labels and
subgroups and the most frequent English words of CLIP's vocabulary are made by. Of a word among these every merge is
there, so it falls into the same tokens as with all 48,894.
"""

import argparse
import gzip
import importlib.metadata
import pathlib
import re

from aegis_jax.canvas import captions, tokenizer
from aegis_jax.world.tokenizer import apply
from tools.canvas import fetch

FREQUENT = 6_000  # whole words of CLIP's, the most frequent first: merges are made in the order of frequency
LEAST_LETTERS = 3
MERGES = 49_152 - 256 - 2  # of the lines of the file: what CLIP reads


def clip_merges() -> list[tuple[str, str]]:
    """All merges of CLIP, as open_clip_torch ships them; the package is not imported, it would bring PyTorch."""
    (path,) = (f for f in importlib.metadata.files("open_clip_torch") if f.name == "bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.locate().read_bytes()).decode("utf-8").split("\n")
    return [tuple(line.split()) for line in lines[1 : MERGES + 1]]


def used(merges: list[tuple[str, str]], words) -> list[tuple[str, str]]:
    """Those of `merges` that `words` go through, in their order."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    found: set[tuple[str, str]] = set()
    for word in words:
        apply([*word[:-1], word[-1] + "</w>"], ranks, found.add)
    return sorted(found, key=ranks.__getitem__)


def frequent(merges: list[tuple[str, str]], count: int = FREQUENT) -> list[str]:
    """The `count` first words of three letters and more, a to z, that are one token."""
    whole = ("".join(pair) for pair in merges)
    pattern = re.compile(f"[a-z]{{{LEAST_LETTERS},}}</w>")
    return [token.removesuffix("</w>") for token in whole if pattern.fullmatch(token)][:count]


def of_emoji(entries: list[dict]) -> list[str]:
    """The words of labels, tags and subgroups."""
    texts = [text for entry in entries for text in (entry["label"], entry["subgroup"], *entry["tags"])]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())})


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=pathlib.Path, required=True, help="folder for what npm brings")
    arguments = parser.parse_args(argv)
    merges = clip_merges()
    entries = fetch.names(fetch.packages(arguments.pictures)[fetch.NAMES])
    words = [*captions.words(), *of_emoji(entries), *frequent(merges)]
    kept = used(merges, words)
    tokenizer.MERGES.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in kept)]) + "\n", "utf-8")
    whole = sum(re.fullmatch("[a-z]+</w>", "".join(pair)) is not None for pair in kept)
    print(f"{len(kept)} merges, {whole} whole words")


if __name__ == "__main__":
    main()
