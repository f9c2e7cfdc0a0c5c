"""The cells that benchmarks/world_study.py runs: which settings, concepts and seeds, and how many images."""

from cells import FINAL, SCREEN  # noqa: F401

ESD = {"aet.enabled": False, "prompt.enabled": False, "grp.retention": "none"}
MEAN = {"aet.init": "mean", "prompt.init": "mean"}


def screen(settings: dict, concepts=("star",)) -> dict:
    return {"measure": SCREEN, "seeds": (0,), "concepts": concepts, "settings": settings}


SETS = {
    # How strong can the attack be made against ESD? Fixed before anything of AEGIS is attacked.
    "attack": {
        "measure": {"images": 64, "evaluation_seed": 0},
        "seeds": (0,),
        "concepts": ("star",),
        "settings": {"ESD": ESD | {"learning_rate": 1e-4}},
        "attacks": [
            {"tokens": tokens, "learning_rate": rate, "restarts": 4, "steps": steps}
            for tokens, rate, steps in ((4, 1e-2, 100), (4, 3e-2, 100), (2, 1e-2, 100), (4, 3e-3, 100))
        ],
    },
    "original": screen({"no erasure": None}, ("star", "red", "striped")),
    # ESD's own learning rate and tensors, so that AEGIS is compared with ESD at its best.
    "esd": screen(
        {
            f"ESD {tensors} lr {rate:g}": ESD | {"learning_rate": rate, "trainable": tensors}
            for tensors, rate in (("full", 3e-5), ("full", 1e-4), ("xattn", 1e-4), ("xattn", 3e-4))
        }
    ),
    # Where soft tokens start, where the latents come from, how strong the adversary is.
    "start": screen(
        {
            "random": {},
            "mean": MEAN,
            "mean, latents of theta0": MEAN | {"latents.refresh_every": 0},
            "mean, k=4": MEAN | {"prompt.tokens": 4},
            "mean, k=4, gamma 1e-2": MEAN | {"prompt.tokens": 4, "prompt.gamma": 1e-2},
            "mean, lr 1.5e-5, 500 steps": MEAN | {"learning_rate": 1.5e-5, "steps": 500},
        }
    ),
}
