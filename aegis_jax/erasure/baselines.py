"""ESD and the paper's ablations as settings of the same step (method.md section 7)."""

import dataclasses

from aegis_jax.erasure.config import EraseConfig

# Not in the paper: preservation, and the concept in context. A variant that says how the rest is kept goes without
# both, one without a part of AEGIS keeps what the config has besides.
_NOT_PRESERVED = {"preserve": {"weight": 0.0}}
_NO_CONTEXT = {"context": False, "context_rate": 0.0}
_PAPER = {"prompt": _NO_CONTEXT, **_NOT_PRESERVED}
_NO_PROMPT = {"prompt": {"enabled": False, "prefixes": 1, **_NO_CONTEXT}}

# Each entry: what it changes in an AEGIS config.
VARIANTS = {
    "aegis": {"grp": {"retention": "grp"}, **_PAPER},
    "w/o AET": {"aet": {"enabled": False}},
    "w/o adversarial prompt": _NO_PROMPT,
    "w/o PR": {"grp": {"retention": "none"}, **_PAPER},
    "w/o DGR": {"grp": {"retention": "constant"}, **_PAPER},
    "fixed omega": {"grp": {"retention": "grp", "omega_rule": "fixed", "omega": 1.0}, **_PAPER},
    "ESD": {"aet": {"enabled": False}, "grp": {"retention": "none"}, **_NO_PROMPT, **_NOT_PRESERVED},
}


def variant(config: EraseConfig, name: str) -> EraseConfig:
    """`config` with the parts of AEGIS switched off that the variant `name` (a key of `VARIANTS`) goes without."""
    changes = {part: dataclasses.replace(getattr(config, part), **fields) for part, fields in VARIANTS[name].items()}
    return dataclasses.replace(config, **changes)
