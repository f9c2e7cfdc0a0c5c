"""The cells that benchmarks/world_study.py runs: which settings, concepts and seeds, and how many images."""

from cells import FINAL, SCREEN  # noqa: F401

ESD = {"aet.enabled": False, "prompt.enabled": False, "grp.retention": "none"}

SETS = {
    # How strong can the attack be made against ESD? Fixed before anything of AEGIS is attacked.
    "attack": {
        "measure": {"images": 64, "evaluation_seed": 0},
        "seeds": (0,),
        "concepts": ("star",),
        "settings": {"ESD": ESD | {"learning_rate": 1e-4}},
        "attacks": [
            {"tokens": tokens, "learning_rate": rate, "restarts": 4, "steps": steps}
            for tokens, rate, steps in (
                (4, 1e-2, 100),
                (4, 3e-2, 100),
                (2, 1e-2, 100),
                (4, 3e-3, 100),
            )
        ],
    },
}
