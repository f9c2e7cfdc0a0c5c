"""Text -> token ids, exactly as a diffusers pipeline does it, from a CLIP tokenizer's files.

transformers does the work and is imported at first use: it takes seconds, and much of aegis_jax
needs no text.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import pathlib
import warnings

import numpy as np

from aegis_jax.errors import AegisError
from aegis_jax.io.folder import read_json

_SHOWN = 80  # characters of what is cut off from a prompt that a warning repeats
_NEEDED = "a CLIP tokenizer has vocab.json and merges.txt, or tokenizer.json"


class Tokenizer:
    """A CLIP tokenizer's folder, read at first use.

    folder: holds vocab.json + merges.txt, or tokenizer.json, usually with tokenizer_config.json.
    limit: how many positions the text encoder has; bounds `model_max_length`, which some folders do
    not state. vocabulary: how many token embeddings it has; other ids are refused.
    """

    def __init__(self, folder: str | os.PathLike, *, limit: int | None = None, vocabulary: int | None = None):
        self.folder = pathlib.Path(folder)
        self.limit = limit
        self.vocabulary = vocabulary
        self._warned: set[str] = set()
        if not self.folder.is_dir():
            raise AegisError(f"{self.folder} is not a folder: {_NEEDED}")
        names = {file.name for file in self.folder.iterdir()}
        if not ({"vocab.json", "merges.txt"} <= names or "tokenizer.json" in names):
            raise AegisError(f"{self.folder} holds no tokenizer: {_NEEDED}; download or copy the folder again")
        for name in sorted(
            names & {"vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
        ):
            read_json(self.folder / name)

    @functools.cached_property
    def _clip(self):
        """transformers' CLIPTokenizer."""
        with _quiet():
            from transformers import CLIPTokenizer

            try:
                found = CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
            except Exception as error:  # transformers and tokenizers raise bare Exception for broken files
                reason = " ".join(str(error).split())[:200]
                raise AegisError(f"cannot read the tokenizer in {self.folder} ({reason}): {_NEEDED}") from error
        for token in ("bos_token", "eos_token", "pad_token"):
            if getattr(found, f"{token}_id") is None:
                raise AegisError(f"the tokenizer in {self.folder} has no {token}: {_NEEDED}")
        return found

    @functools.cached_property
    def _vectors(self) -> dict[str, str]:
        """{<x>: "<x> <x>_1 ..."} of the textual inversions of several vectors, as diffusers adds them."""
        added = self._clip.added_tokens_encoder
        found = {}
        for token in added:
            names = itertools.takewhile(added.__contains__, (f"{token}_{i}" for i in itertools.count(1)))
            found[token] = " ".join([token, *names])
        return {token: names for token, names in found.items() if names != token}

    def _spelled_out(self, text: str) -> str:
        """`text` with all vectors of its textual inversions: `maybe_convert_prompt` of a diffusers pipeline."""
        text = _unicode(text)
        if any(token in text for token in self._vectors):
            for token in dict.fromkeys(self._clip.tokenize(text)):
                text = text.replace(token, self._vectors.get(token, token))
        return text

    @property
    def model_max_length(self) -> int:
        """Tokens per prompt, with BOS and EOS."""
        length = self._clip.model_max_length  # about 1e30 where the files do not say
        if type(length) is not int or length < 3:
            raise AegisError(
                f"{self.folder}: tokenizer_config.json has model_max_length = {length!r}, wanted a whole number of at "
                "least 3, e.g. 77"
            )
        if self.limit is None and length > 2**20:
            raise AegisError(f"{self.folder}: tokenizer_config.json does not state model_max_length: add it, e.g. 77")
        return length if self.limit is None else min(length, self.limit)

    @property
    def bos_token_id(self) -> int:
        return self._clip.bos_token_id

    @property
    def eos_token_id(self) -> int:
        return self._clip.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """What fills a prompt up: EOS in SD 1.x, "!" (id 0) in SD 2.x."""
        return self._clip.pad_token_id

    @functools.cached_property
    def word_ids(self) -> np.ndarray:
        """Ids of the whole words of two letters and more (and of word endings like them), int32, sorted; no digits,
        signs or emoji.

        In a vocabulary that has none, of single characters, those of all its tokens but BOS, EOS and the like.
        """
        vocabulary = self._clip.get_vocab()
        found = [i for piece, i in vocabulary.items() if self._is_word(piece)]
        found = found or [i for i in vocabulary.values() if i not in self._clip.all_special_ids]
        return self._known(np.sort(np.array(found, np.int64))).astype(np.int32)

    def digest(self) -> str:
        """sha256 of its files and of `model_max_length`, which together decide its ids."""
        found = hashlib.sha256(str(self.model_max_length).encode())
        for file in sorted(self.folder.iterdir()):
            if file.suffix == ".json" or file.name == "merges.txt":
                found.update(file.name.encode() + b"\0" + file.read_bytes())
        return found.hexdigest()

    def _is_word(self, piece: str) -> bool:
        """Whether a piece of the vocabulary ends a word and is of letters, at least two."""
        word, end, _ = piece.rpartition("</w>")
        if not end or len(word) < 2:
            return False
        if not word.isascii():  # bytes that stand for other characters
            word = self._clip.convert_tokens_to_string([word])
        return len(word) > 1 and word.isalpha()

    def tokens(self, text: str) -> list[int]:
        """The ids of the text alone: no BOS, no EOS, no padding, not truncated."""
        tokens = self._clip(self._spelled_out(text), add_special_tokens=False, verbose=False)["input_ids"]
        self._known(np.array(tokens, np.int64))
        return tokens

    @property
    def size(self) -> int:
        """How many ids it gives, those of BOS, EOS and added tokens included."""
        return max(self._clip.get_vocab().values()) + 1

    def text(self, tokens) -> str:
        """The text of token ids, BOS and the like spelled out. `tokens` of it may give others: pieces run together."""
        return self._clip.decode([int(token) for token in tokens])

    def ids(self, prompts: list[str]) -> np.ndarray:
        """Token ids of prompts, int32 (n, model_max_length): BOS, tokens, EOS, padding.

        Longer prompts are cut as diffusers cuts them, EOS last; one warning tells of all that were cut off, each
        prompt once.
        """
        length = self.model_max_length
        texts = [self._spelled_out(prompt) for prompt in prompts]
        rows = self._clip(texts, padding="max_length", max_length=length, truncation=True, return_attention_mask=True)
        full = [prompt for prompt, mask in zip(prompts, rows["attention_mask"]) if all(mask)]
        self._warn_of_cut(full, length)
        return self._known(np.asarray(rows["input_ids"], np.int64).reshape(len(prompts), length)).astype(np.int32)

    def _known(self, ids: np.ndarray) -> np.ndarray:
        """`ids`, all of which the text encoder has an embedding for: JAX would read NaN beyond the table's end."""
        largest = ids.max(initial=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise AegisError(
                f"{self.folder} gives token id {largest}, but the text encoder's vocab_size is {self.vocabulary}: "
                "tokenizer and text encoder do not belong together"
            )
        return ids

    def _warn_of_cut(self, prompts: list[str], length: int) -> None:
        """One warning for all the prompts that are cut off; a prompt is named once in this tokenizer's life."""
        cut = []
        for prompt in dict.fromkeys(prompts):
            if prompt in self._warned:
                continue
            tokens = self.tokens(prompt)
            if len(tokens) > length - 2:
                self._warned.add(prompt)
                cut.append((len(tokens), self._clip.decode(tokens[length - 2 :]).strip()))
        if cut:
            tokens, lost = cut[0]
            lost = lost if len(lost) <= _SHOWN else f"{lost[:_SHOWN]}..."
            which = "the prompt has" if len(cut) == 1 else f"{len(cut)} prompts are too long; the first has"
            warnings.warn(
                f"{which} {tokens} tokens and the text encoder sees {length - 2}; cut off: {lost!r}", stacklevel=4
            )


def _unicode(text: str) -> str:
    """`text`, refused if it holds bytes that were no UTF-8, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise AegisError(f"text {ascii(text)[:60]} is not valid Unicode: check how it was encoded") from None
    return text


@contextlib.contextmanager
def _quiet():
    """Keeps transformers' notices off the screen, such as that PyTorch was not found."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    logger = logging.getLogger("transformers")
    level = logger.level
    quiet = lambda record: record.levelno >= logging.ERROR  # noqa: E731
    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)
        logger.setLevel(level)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
