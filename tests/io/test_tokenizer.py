"""Token ids against what a diffusers pipeline makes of the same prompts."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest

from aegis_jax.errors import AegisError
from aegis_jax.io.tokenizer import Tokenizer
from tests.tiny import EOS, tiny_tokenizer

PROMPTS = [
    "",
    "a photo of a red star",
    "A  PAINTING\nof a Church!",
    "it's 3 dogs, naïve façade 猫 🐈 <|endoftext|> x",
    "!!!",
    "a striped heart on a plain background",
]


def as_diffusers(folder, prompts, length):
    """StableDiffusionPipeline.encode_prompt, up to the text encoder."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids


@pytest.mark.parametrize("form", ["slow", "fast", "both"])
@pytest.mark.parametrize("pad", [EOS, "!"], ids=["SD 1.x", "SD 2.x"])
@pytest.mark.parametrize("length", [77, 24])
def test_ids_are_those_of_diffusers(form, pad, length, tmp_path):
    folder = tiny_tokenizer(tmp_path, pad=pad, form=form, max_length=length)
    tokenizer = Tokenizer(folder)
    prompts = [*PROMPTS, "a red star and " * 40]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        ids = tokenizer.ids(prompts)
    assert ids.dtype == np.int32 and ids.shape == (len(prompts), length)
    np.testing.assert_array_equal(ids, as_diffusers(folder, prompts, length))
    vocab_size = 592
    assert tokenizer.model_max_length == length
    assert tokenizer.bos_token_id == vocab_size - 2 and tokenizer.eos_token_id == vocab_size - 1
    assert tokenizer.pad_token_id == (0 if pad == "!" else vocab_size - 1)
    empty = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert ids[0].tolist() == empty + [tokenizer.pad_token_id] * (length - 2)
    assert ids[-1, -1] == tokenizer.eos_token_id
    tokens = tokenizer.tokens("a photo of a red star")
    assert ids[1, 1:7].tolist() == tokens and len(tokens) == 6
    assert len(tokenizer.tokens("star " * 200)) == 200


def test_textual_inversions_of_several_vectors_are_spelled_out(tmp_path):
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "before"))
    theirs.add_tokens(["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<frida>", "<gap>", "<gap>_2"])
    theirs.save_pretrained(tmp_path / "added")
    ours = Tokenizer(tmp_path / "added")
    convert = TextualInversionLoaderMixin().maybe_convert_prompt
    for prompt in ("a photo of <cat-toy>", "<cat-toy> the red <frida>, <cat-toy>!", "<gap>", "a red star", "cat-toy_1"):
        spelled_out = convert(prompt, theirs)
        assert ours.tokens(prompt) == theirs(spelled_out, add_special_tokens=False).input_ids
        assert ours.ids([prompt]).tolist() == as_diffusers(tmp_path / "added", [spelled_out], 77).tolist()
    assert ours.tokens("<cat-toy>") == [592, 593, 594]


def test_truncation_names_the_lost_words_once(tmp_path):
    tokenizer = Tokenizer(tiny_tokenizer(tmp_path, max_length=8))
    long = "a red star and a blue heart on the sky"
    with pytest.warns(UserWarning, match="10 tokens.* sees 6; cut off: 'heart on the sky'"):
        tokenizer.ids(["a dog", long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.ids([long])  # said already
        tokenizer.ids(["a red star and a cat"])  # fits exactly
        tokenizer.tokens(long)


def test_of_what_is_cut_off_a_warning_shows_the_beginning(tmp_path):
    tokenizer = Tokenizer(tiny_tokenizer(tmp_path, max_length=8))
    with pytest.warns(UserWarning, match=r"3000 tokens.*; cut off: '(star ){16}\.\.\.'$"):
        tokenizer.ids(["star " * 3000])


@pytest.mark.parametrize(("text", "count"), [("İİİ", 9), ("\ufb2c", 6), ("\ufb2c\ufb2c", 12)])
def test_a_prompt_that_grows_as_it_is_normalised_is_told_of(text, count, tmp_path):
    """Lower-cased the first has 9 bytes of 6, in its composed form the last 12."""
    tokenizer = Tokenizer(tiny_tokenizer(tmp_path, max_length=8))
    assert len(tokenizer.tokens(text)) == count
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert tokenizer.ids([text]).shape == (1, 8)
    assert [f"{count} tokens" in str(warning.message) for warning in said] == [True] * (count > 6)


def test_the_text_encoder_bounds_the_length(tmp_path):
    folder = tiny_tokenizer(tmp_path)
    assert Tokenizer(folder, limit=16).model_max_length == 16
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(folder, limit=77).ids(["a dog"]).shape == (1, 77)
    with pytest.raises(AegisError, match="does not state model_max_length"):
        Tokenizer(folder).ids(["a dog"])


def test_ids_beyond_the_text_encoders_table_are_refused(tmp_path):
    folder = tiny_tokenizer(tmp_path)
    assert Tokenizer(folder, vocabulary=592).ids(["a star"]).max() == 591
    fewer = Tokenizer(folder, vocabulary=591)  # EOS is 591
    assert fewer.tokens("a star") == Tokenizer(folder).tokens("a star")
    with pytest.raises(AegisError, match="gives token id 591, but the text encoder's vocab_size is 591"):
        fewer.ids(["a star"])
    for method in (lambda t: t.tokens("a star"), lambda t: t.word_ids):
        with pytest.raises(AegisError, match="vocab_size is 300"):
            method(Tokenizer(folder, vocabulary=300))
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocab | {"star</w>": 2**31}))
    for method in (lambda t: t.ids(["a star"]), lambda t: t.tokens("a star"), lambda t: t.word_ids):
        with pytest.raises(AegisError, match="gives token id 2147483648, but .* vocab_size is 592"):
            method(Tokenizer(folder, vocabulary=592))


def test_a_vocabulary_without_words_has_its_characters_for_words(tmp_path):
    folder = tiny_tokenizer(tmp_path)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    kept = [piece for piece in vocab if len(piece.removesuffix("</w>")) == 1] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: k for k, piece in enumerate(kept)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = Tokenizer(folder)
    np.testing.assert_array_equal(np.sort(tokenizer.word_ids), np.arange(512))
    assert len(tokenizer.tokens("star")) == 4


@pytest.mark.parametrize("length", ["77", 0, -5, 1.5, [], True])
def test_a_length_that_is_none_is_refused(length, tmp_path):
    with pytest.raises(AegisError, match="model_max_length = "):
        Tokenizer(tiny_tokenizer(tmp_path, max_length=length), limit=77).ids(["a star"])


def test_text_that_is_not_unicode_is_refused(tmp_path):
    tokenizer = Tokenizer(tiny_tokenizer(tmp_path))
    for method in (tokenizer.tokens, lambda text: tokenizer.ids([text])):
        with pytest.raises(AegisError, match=r"'st\\udcffar' is not valid Unicode"):
            method("st\udcffar")  # what the bytes 's t 0xff a r' become on a command line


def test_broken_folders(tmp_path):
    with pytest.raises(AegisError, match="nothing is not a folder: a CLIP tokenizer has vocab.json"):
        Tokenizer(tmp_path / "nothing")
    folder = tiny_tokenizer(tmp_path / "a")
    (folder / "merges.txt").unlink()
    with pytest.raises(AegisError, match="holds no tokenizer"):
        Tokenizer(folder)
    folder = tiny_tokenizer(tmp_path / "b")
    (folder / "vocab.json").write_text("{")
    with pytest.raises(AegisError, match="vocab.json is not valid JSON"):
        Tokenizer(folder)
    folder = tiny_tokenizer(tmp_path / "c", form="fast")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(AegisError, match="cannot read the tokenizer in .*c"):
        Tokenizer(folder).ids(["a"])
    folder = tiny_tokenizer(tmp_path / "d")
    (folder / "special_tokens_map.json").write_text('{"pad_token": null}')
    with pytest.raises(AegisError, match="d has no pad_token"):
        Tokenizer(folder).ids(["a"])


SILENT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else find(name, *a)
from aegis_jax.io.tokenizer import Tokenizer
tokenizer = Tokenizer(sys.argv[1])
assert "transformers" not in sys.modules
tokenizer.ids(["a dog"])
assert "transformers" in sys.modules and "torch" not in sys.modules
print("done")
"""


def test_transformers_comes_late_and_says_nothing(tmp_path):
    """Without PyTorch transformers announces so at import; that must not reach the screen."""
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    env.pop("TRANSFORMERS_VERBOSITY", None)
    command = [sys.executable, "-c", SILENT, str(tiny_tokenizer(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("done\n", "")
    loud = "\n".join(SILENT.splitlines()[:4]) + "\nfrom transformers import CLIPTokenizer"
    done = subprocess.run([sys.executable, "-c", loud], capture_output=True, text=True, env=env)
    assert "PyTorch was not found" in done.stderr


def test_words_are_of_letters(tmp_path):
    """Of what ends a word in a vocabulary: letters of any script, at least two; no digits, signs or emoji."""
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    before = set(Tokenizer(folder).word_ids)
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text("utf-8"))
    # Printable bytes stand for themselves, the others in turn for the characters from 256 on.
    rest = itertools.count(256)
    symbols = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else chr(next(rest)) for b in range(256)]
    ids = {text: len(vocab) + i for i, text in enumerate(("20", "..", "été", "🙂", "é", "ok"))}
    pieces = {"".join(symbols[b] for b in text.encode()) + "</w>": i for text, i in ids.items()}
    path.write_text(json.dumps(vocab | pieces, ensure_ascii=False), "utf-8")
    assert set(Tokenizer(folder).word_ids) - before == {ids["été"], ids["ok"]}
