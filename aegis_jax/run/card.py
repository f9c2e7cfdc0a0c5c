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

Method: `{preset}` of aegis_jax {version} ({about}). {described}
{changed}
| setting | value |
| --- | --- |
{table}

## How it was measured

{measured}

## Limits

Erasure lowers the chance that the concept appears; it does not prove that no prompt can bring it
back. Whoever holds the original weights can undo it.
"""


def text(run, metrics: list[dict], measured: str | None = None) -> str:
    """README.md of the exported folder. measured: a table, if anything was measured."""
    erase = run.erase
    # A hub id is worth stating whole; where a folder lay on somebody's disk is not.
    model = Path(run.model).name if Path(run.model).is_absolute() else run.model or "a pipeline"
    settings = flat(dataclasses.asdict(erase))
    quoted = " and ".join(f'"{concept}"' for concept in run.concepts)
    own = flat(dataclasses.asdict(switched(erase, erase.method)))
    differs = [f"`{key}={settings[key]}` (there {value})" for key, value in own.items() if settings[key] != value]
    return _TEXT.format(
        title=f"{Path(model).name} without {quoted}",
        model=model,
        concepts=quoted,
        version=__version__,
        preset=erase.method,
        about=preset(erase.method).about,
        described=run.method.described(erase, len(run.concepts)),
        changed=f"\nIt differs from that preset in {', '.join(differs)}.\n" if differs else "",
        table="\n".join(f"| {key} | {value} |" for key, value in settings.items()),
        measured=f"```\n{measured}\n```" if measured else _unmeasured(metrics),
    )


def _unmeasured(metrics: list[dict]) -> str:
    last = metrics[-1]
    norm = f" and the distance from the original {last['drift_norm']:.3e}" if "drift_norm" in last else ""
    return f"Not measured beyond training. At the last step the erasure loss was {last['L_e']:.3e}{norm}."
