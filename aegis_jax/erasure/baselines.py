"""ESD and the paper's ablations as settings of the same step (method.md section 7)."""

import dataclasses

from aegis_jax.erasure.config import EraseConfig

_NOT = {"weight": 0.0}  # preservation is not in the paper, so what names a way of keeping the rest goes without

# Each entry: what it changes in an AEGIS config.
VARIANTS = {
    "aegis": {"grp": {"retention": "grp"}, "preserve": _NOT},
    "w/o AET": {"aet": {"enabled": False}},
    "w/o adversarial prompt": {"prompt": {"enabled": False, "prefixes": 1}},
    "w/o PR": {"grp": {"retention": "none"}, "preserve": _NOT},
    "w/o DGR": {"grp": {"retention": "constant"}, "preserve": _NOT},
    "fixed omega": {"grp": {"retention": "grp", "omega_rule": "fixed", "omega": 1.0}, "preserve": _NOT},
    "ESD": {
        "aet": {"enabled": False},
        "prompt": {"enabled": False, "prefixes": 1},
        "grp": {"retention": "none"},
        "preserve": _NOT,
    },
}


def variant(config: EraseConfig, name: str) -> EraseConfig:
    """`config` with the parts of AEGIS switched off that the variant `name` (a key of `VARIANTS`) goes without."""
    changes = {part: dataclasses.replace(getattr(config, part), **fields) for part, fields in VARIANTS[name].items()}
    return dataclasses.replace(config, **changes)
