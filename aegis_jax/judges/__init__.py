"""Judges say what an image shows. `load` makes one of its spec; docs/judges.md tells what each is and does.

A spec is KIND, KIND:WHAT, or either with options behind a question mark: "world", "world:second", "nudenet:strict",
"hf:FOLDER?top=3". Kinds besides ours come from installed packages, by entry points of the group `aegis_jax.judges`:
functions of (what, options), both as written, that give a `Judge`.
"""

import dataclasses
import importlib
import importlib.metadata

from aegis_jax.errors import AegisError, is_full_device
from aegis_jax.judges.judge import Judge, digest

__all__ = ["GROUP", "KINDS", "Judge", "digest", "load"]

GROUP = "aegis_jax.judges"
# Modules with `load(what, options)`, imported when asked for.
KINDS = {kind: f"aegis_jax.judges.{name}" for kind, name in (
    ("world", "world"), ("canvas", "canvas"), ("hf", "hf"), ("nudenet", "nudity"), ("clip", "zero_shot"),
)}  # fmt: skip


def load(spec: str) -> Judge:
    """The judge of a spec. Raises `AegisError` for an unknown kind, and for what that kind does not take."""
    rest, _, query = spec.partition("?")
    kind, _, what = rest.partition(":")
    pairs = [part.partition("=") for part in query.split("&")] if query else []
    options = {name: value for name, _, value in pairs}
    if len(options) < len(pairs) or not all(name and equals for name, equals, _ in pairs):
        raise AegisError(f"judge {spec!r}: options are written ?name=value&name=value, each name once")
    if kind in KINDS:
        make = importlib.import_module(KINDS[kind]).load
    else:
        make = _plugin(kind)
    try:
        judge = make(what, options)
    except AegisError as error:
        raise AegisError(f"judge {spec!r}: {error}") from error
    except Exception as error:
        if kind in KINDS:
            raise
        # A package of somebody else's: whatever it raises.
        raise AegisError(f"judge {spec!r}: the package that brings {kind!r} raised {error!r}") from error
    if not isinstance(judge, Judge):
        raise AegisError(f"judge {spec!r}: the package that brings {kind!r} gave no aegis_jax.judges.Judge")
    return judge if kind in KINDS else _told(judge)


def _told(judge: Judge) -> Judge:
    """A judge of somebody else's, with what it raises in one line that names it."""

    def told(compute):
        def asked(images):
            try:
                return compute(images)
            except (AegisError, MemoryError):
                raise
            except Exception as error:
                if is_full_device(error):
                    raise
                raise AegisError(f"judge {judge.name} raised {error!r}") from error

        return asked

    features = None if judge.features is None else told(judge.features)
    return dataclasses.replace(judge, compute=told(judge.compute), features=features)


def _plugin(kind: str):
    points = importlib.metadata.entry_points(group=GROUP)
    for point in points:
        if point.name == kind:
            try:
                return point.load()
            except Exception as error:  # a package of somebody else's: whatever it raises
                raise AegisError(f"the judge {kind!r} of {point.value} cannot be loaded: {error!r}") from error
    known = [*KINDS, *sorted(point.name for point in points)]
    raise AegisError(f"judge kind {kind!r} is unknown; there are: {', '.join(known)} (docs/judges.md)")


def take(options: dict[str, str], **kinds) -> dict:
    """The options as values: {name: kind(text)}. Raises `AegisError` for others, and for what `kind` does not take."""
    unknown = sorted(set(options) - set(kinds))
    if unknown:
        raise AegisError(f"option {unknown[0]!r} is unknown; there are: {', '.join(kinds) or 'none'}")
    values = {}
    for name, text in options.items():
        try:
            values[name] = kinds[name](text)
        except ValueError:
            raise AegisError(f"option {name}={text!r}, wanted {kinds[name].__name__}") from None
    return values
