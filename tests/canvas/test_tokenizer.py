"""The canvas's tokenizer: CLIP's merges, read alike by transformers, by the library and by the training."""

import json

import numpy as np
import pytest

from aegis_jax.canvas import captions, tokenizer
from aegis_jax.canvas.concepts import Concepts
from aegis_jax.io.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
# What CLIP's own tokenizer (48,894 merges) makes of these.
CLIPS = {
    "fox": ["fox</w>"], "watermelon": ["watermelon</w>"], "snowflake": ["snowflake</w>"], "lollipop": ["lollipop</w>"],
    "tigress": ["ti", "gress</w>"], "padlock": ["pad", "lock</w>"], "twemoji": ["twe", "mo", "ji</w>"],
    "starbucks": ["starbucks</w>"], "president": ["president</w>"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.CLIPTokenizer.from_pretrained(folder)


def test_words_fall_into_clips_tokens(theirs):
    assert {word: theirs.tokenize(word) for word in CLIPS} == CLIPS


def test_thousands_of_whole_words_and_few_are_drawn(theirs):
    whole = {token[:-4] for token in tokenizer.vocabulary() if token[:-4].isalpha() and token.endswith("</w>")}
    assert 5000 <= len(whole) <= 8000
    assert len(whole & set(captions.words())) < 0.15 * len(whole)
    names = [value.name for row in Concepts().attributes.values() for value in row]
    assert np.mean([name in whole for name in names]) > 0.9


def test_all_three_encode_alike(theirs, folder):
    concepts, rng = Concepts(), np.random.default_rng(0)
    texts, _ = captions.sample(rng, concepts.combinations[rng.integers(0, len(concepts.combinations), 400)], concepts)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=tokenizer.MAX_LENGTH)["input_ids"]
    np.testing.assert_array_equal(tokenizer.encode(texts), expected)
    np.testing.assert_array_equal(Tokenizer(folder, limit=tokenizer.MAX_LENGTH).ids(texts), expected)
    words = max(len(text.split()) for text in texts)
    longest = tokenizer.longest(captions.words(), words)
    assert (np.array(expected) != theirs.eos_token_id).sum(1).max() + 1 <= longest


@pytest.mark.parametrize("text", ["Foo Fox", "étoile 星", "red-fox!", "x" * 12, "  a   red\tfox\n"])
def test_any_text_tokenises_as_in_the_library(theirs, folder, text):
    ids = theirs(text, padding="max_length", truncation=True, max_length=tokenizer.MAX_LENGTH)["input_ids"]
    assert list(Tokenizer(folder, limit=tokenizer.MAX_LENGTH).ids([text])[0]) == ids


def test_ids_are_laid_out_as_clips(theirs, folder):
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert sorted(vocab.values()) == list(range(len(vocab))) and len(theirs) == len(vocab)
    assert vocab["!"] == 0 and vocab["a</w>"] == 320
    assert (vocab[tokenizer.BOS], vocab[tokenizer.EOS]) == (len(vocab) - 2, len(vocab) - 1)
