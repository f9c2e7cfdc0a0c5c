"""The model card of an erased pipeline: what was erased, from what, how, and what to expect."""

import dataclasses
from pathlib import Path

from aegis_jax import __version__
from aegis_jax.erasure.presets import preset, switched
from aegis_jax.run.config import flat

_TEXT = """---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- stable-diffusion
- concept-erasure
- aegis_jax
---

# {title}

The Stable Diffusion pipeline `{model}` with {concepts} erased.

## How

{how}

## How it was measured

{measured}

## Limits

Erasure lowers the chance that the concept appears; it does not prove that no prompt can bring it
back. Whoever holds the original weights can undo it.
"""
_METHOD = """Method: `{preset}` of aegis_jax {version} ({about}). {described}
{changed}
| setting | value |
| --- | --- |
{table}"""


def text(run, metrics: list[dict], measured: str | None = None) -> str:
    """README.md of the exported folder. measured: a table, if anything was measured."""
    erase = run.erase
    # A hub id is worth stating whole; where a folder lay on somebody's disk is not.
    model = Path(run.model).name if Path(run.model).is_absolute() else run.model or "a pipeline"
    settings = flat(dataclasses.asdict(erase))
    own = flat(dataclasses.asdict(switched(erase, erase.method)))
    differs = [f"`{key}={settings[key]}` (there {value})" for key, value in own.items() if settings[key] != value]
    how = _METHOD.format(
        version=__version__,
        preset=erase.method,
        about=preset(erase.method).about,
        described=run.method.described(erase, len(run.concepts)),
        changed=f"\nIt differs from that preset in {', '.join(differs)}.\n" if differs else "",
        table="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
    )
    return _card(model, run.concepts, how, f"```\n{measured}\n```" if measured else _unmeasured(metrics))


def composed(model: str, concepts: list[str], by: str, methods: list[str]) -> str:
    """README.md of a pipeline of merged erasures. methods: those that they were made by."""
    own = ", ".join(f"`{method}`" for method in methods)
    how = f"Erased one by one ({own}), then merged by `aegis compose --by {by}` of aegis_jax {__version__}."
    measured = "Not measured after merging, by which an erasure may lose something, and what is kept too."
    return _card(model, concepts, how, measured)


def _card(model: str, concepts, how: str, measured: str) -> str:
    quoted = " and ".join(f'"{concept}"' for concept in concepts)
    return _TEXT.format(
        title=f"{Path(model).name} without {quoted}", model=model, concepts=quoted, how=how, measured=measured
    )


def _unmeasured(metrics: list[dict]) -> str:
    last = metrics[-1]
    norm = f" and the distance from the original {last['drift_norm']:.3e}" if "drift_norm" in last else ""
    return f"Not measured beyond training. At the last step the erasure loss was {last['L_e']:.3e}{norm}."
