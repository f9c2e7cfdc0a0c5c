"""The world's tokenizer files, read by transformers."""

import json

import numpy as np
import pytest

from aegis_jax.world import captions, renderer, tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write(path, captions.words())
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.CLIPTokenizer.from_pretrained(folder)


def test_every_word_is_one_token(theirs):
    vocab, _ = tokenizer.build(captions.words())
    for word in captions.words():
        assert theirs(word, add_special_tokens=False)["input_ids"] == [vocab[word + "</w>"]]


def test_our_encoding_equals_theirs(theirs):
    rng = np.random.default_rng(0)
    texts, _ = captions.sample(rng, renderer.labels(rng, 500))
    vocab, _ = tokenizer.build(captions.words())
    expected = theirs(texts, padding="max_length", truncation=True, max_length=tokenizer.MAX_LENGTH)["input_ids"]
    np.testing.assert_array_equal(tokenizer.encode(texts, vocab), expected)


def test_length_and_special_ids(theirs, folder):
    vocab = json.loads((folder / "vocab.json").read_text())
    assert theirs.model_max_length == tokenizer.MAX_LENGTH >= captions.LONGEST + 2 + 4  # 4 soft tokens fit
    assert theirs.bos_token_id == vocab[tokenizer.BOS]
    assert theirs.eos_token_id == theirs.pad_token_id == vocab[tokenizer.EOS]
    assert sorted(vocab.values()) == list(range(len(vocab))) and len(theirs) == len(vocab)


@pytest.mark.parametrize("text", ["Foo Star", "étoile 星", "red-star!", "x" * 12, "  a   red\tstar\n"])
def test_any_text_tokenises_and_comes_back(theirs, text):
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids and theirs.eos_token_id not in ids
    assert theirs.decode(ids).split() != [] and max(ids) < len(theirs)


def test_case_and_spaces_do_not_matter(theirs):
    assert theirs("A  Red STAR")["input_ids"] == theirs("a red star")["input_ids"]
