"""The user's cache folder: what can be made again, and takes long."""

import contextlib
import json
import os
import tempfile
from pathlib import Path


def folder() -> Path | None:
    """$AEGIS_CACHE_DIR, or else `aegis_jax` in the user's cache folder, made if it is not there; None where it cannot
    be: a home that is missing or read-only costs time alone."""
    chosen = os.environ.get("AEGIS_CACHE_DIR")
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "aegis_jax"
    try:
        found = (Path(chosen) if chosen else default).expanduser()
        found.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return found


def read(kind: str, key: str):
    """The JSON value that `write` kept under that kind and key; None without one, and for a damaged file."""
    found = folder()
    try:
        return json.loads((found / kind / f"{key}.json").read_text("utf-8")) if found else None
    except (OSError, ValueError):
        return None


def write(kind: str, key: str, value) -> None:
    """Keeps a JSON value, as a whole or not at all; a full or read-only disk keeps nothing."""
    found = folder()
    if found is None:
        return
    with contextlib.suppress(OSError):
        (found / kind).mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=found / kind, suffix=".part", delete=False, encoding="utf-8") as file:
            try:
                json.dump(value, file)
                file.close()
                os.replace(file.name, found / kind / f"{key}.json")
            except BaseException:
                os.unlink(file.name)
                raise
