"""run/slug.py: what a text becomes as a name."""

import os
import unicodedata

import pytest

from aegis_jax.run.slug import MOST_BYTES, slug


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("star", "star"),
        ("a red star", "a-red-star"),
        ("J.M.W. Turner", "j-m-w-turner"),
        ("Dr. Seuss", "dr-seuss"),
        ("St. Basil's Cathedral", "st-basil-s-cathedral"),
        ("Greg Rutkowski / artstation", "greg-rutkowski-artstation"),
        ("梵高", "梵高"),
        ("Édouard Manet", "édouard-manet"),
        ("Василий Кандинский", "василий-кандинский"),
        ("हिन्दी चित्र", "हिन्दी-चित्र"),  # its vowel signs are no letters
        ("ＦＵＬＬ width", "full-width"),
        ("", ""),
        (" ", ""),
    ],
)
def test_names(text, wanted):
    assert slug(text) == unicodedata.normalize("NFKC", wanted)


HOSTILE = ["../../escape", "/etc/passwd", "..", "a\0b", "a\nb", "C:\\x", "~", "-rf", ".hidden", "con", "COM1", "NUL"]
LOSSY = ["C", "C++", "C--*", "🎨", "🖼", "!!!", "???", "x" * 300, "x" * 299, "梵" * 90, "梵" * 91, "\udce9", *HOSTILE]


def test_names_are_safe():
    for text in LOSSY:
        name = slug(text)
        assert name and len(name.encode()) <= MOST_BYTES, text
        assert not set(name) & set('/\\.:*?"<>|\0\n ~') and not name.startswith("-"), text
        assert name not in ("con", "com1", "nul")


def test_what_would_collide_gets_a_hash():
    texts = ["C", "C++", "C+", "🎨", "🖼", "!!!", "???", "x" * 300, "x" * 299, "梵" * 90, "梵" * 91]
    assert len({slug(text) for text in texts}) == len(texts)


def test_letters_that_the_file_system_cannot_hold(monkeypatch):
    def latin(text):
        return text.encode("latin-1")

    monkeypatch.setattr(os, "fsencode", latin)
    names = {slug(text) for text in ("Édouard 梵高", "Édouard 高梵", "梵高")}
    assert len(names) == 3 and all(latin(name) for name in names)
