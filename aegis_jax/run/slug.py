"""Names of folders and files made from a text: readable, in any script, and safe."""

import hashlib
import os
import unicodedata

MOST_BYTES = 80  # of the result; a file system takes 255, and numbers and endings are added
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789")}  # Windows'


def numbered(k: int, count: int, digits: int = 3) -> str:
    """k, one of `count` numbers from 0: with as many digits for each that names are in the order of their numbers."""
    return str(k).zfill(max(digits, len(str(count - 1))))


def slug(text: str) -> str:
    """Letters and digits of any script in lower case, words joined by "-": "J.M.W. Turner" -> "j-m-w-turner".

    A short hash of the text is appended where the rest does not tell it from others: if something was cut off at
    `MOST_BYTES`, or symbols such as "+" or an emoji have no place in a name. So texts that share a slug differ only in
    case, spaces and punctuation. "" for a text without anything in it.
    """
    words, lost = [""], False
    for char in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(char)
        if char.isalnum() or (kind[0] == "M" and words[-1]):
            if _can_be_named(char):
                words[-1] += char
            else:
                lost = True
        elif kind != "Cf":  # those, such as joiners, stand within words
            lost = lost or kind[0] in "SC" and not char.isspace()
            words.append("")
    name = "-".join(filter(None, words))
    short = _cut(name, MOST_BYTES)
    if lost or short != name or name in _RESERVED or (text.strip() and not name):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return f"{_cut(name, MOST_BYTES - 9)}-{digest}".lstrip("-")
    return name


def _can_be_named(char: str) -> bool:
    try:
        os.fsencode(char)
    except UnicodeEncodeError:  # a file system of another encoding
        return False
    return True


def _cut(name: str, size: int) -> str:
    return name.encode()[:size].decode("utf-8", "ignore").rstrip("-")
