"""What tests of `aegis attack` give it, and results in place of an attack's."""

import numpy as np

from aegis_jax.attacks.result import AttackResult
from aegis_jax.diffusion.conditioning import encode


def indexed(folder):
    from aegis_jax.run.prompts import COLUMNS, write_index

    rows = {f"{k}.png": dict.fromkeys(COLUMNS, "") | {"prompt": f"a dog {k}", "seed": 7 + k} for k in range(3)}
    write_index(folder, {name: row | {"file": name} for name, row in rows.items()})


def found(pipeline, prompts, outcomes=None):
    """A result that says just these prompts."""
    return AttackResult(
        list(prompts), encode(pipeline, list(prompts)), np.ones((2, len(prompts))), 10.0, 1.0,
        same_tokens=np.ones(len(prompts), bool), outcomes=outcomes,
    )  # fmt: skip
