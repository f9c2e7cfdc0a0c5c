"""The cells that benchmarks/world_study.py runs: which settings, concepts and seeds, and how many images."""

from cells import FINAL, SCREEN

# What the first screening started from: the world's config says by now what the study found.
START = {"learning_rate": 3e-5, "trainable": "full", "aet.init": "random", "prompt.init": "random"}
ESD = {"aet.enabled": False, "prompt.enabled": False, "grp.retention": "none"}
MEAN = {"aet.init": "mean", "prompt.init": "mean"}
FAST = {"learning_rate": 1e-4}
FREE = {"grp.retention": "none"}
XATTN = {"trainable": "xattn"}
RULE = {"grp.omega_rule": "hypergradient", "grp.omega": 0.0}
BEST = MEAN | XATTN | {"learning_rate": 3e-4}
STRONG = {"prompt.tokens": 4, "prompt.gamma": 1e-2}


def screen(settings: dict, concepts=("star",)) -> dict:
    return {"measure": SCREEN, "seeds": (0,), "concepts": concepts, "settings": from_start(settings)}


def from_start(settings: dict) -> dict:
    return {name: changes if changes is None else START | changes for name, changes in settings.items()}


SETS = {
    # How strong can the attack be made against ESD? Fixed before anything of AEGIS is attacked.
    "attack": {
        "measure": {"images": 64, "evaluation_seed": 0},
        "seeds": (0,),
        "concepts": ("star",),
        "settings": from_start({"ESD": ESD | {"learning_rate": 1e-4}}),
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
    # Where soft tokens start, where the latents come from, how strong the adversary is. At ESD's lower rate the
    # projection leaves so small a drift that the concept stays.
    "start": screen(
        {"random lr 3e-05": {}, "mean, latents of theta0": MEAN | {"latents.refresh_every": 0}},
    ),
    "rate": screen(
        {
            "mean lr 1e-4": MEAN | FAST,
            "mean lr 1e-4, k=4": MEAN | FAST | {"prompt.tokens": 4},
            "random lr 1e-4": FAST,
            "mean lr 1e-4, latents of theta0": MEAN | FAST | {"latents.refresh_every": 0},
            "mean lr 2e-4": MEAN | {"learning_rate": 2e-4},
            "mean lr 1e-4, omega linear": MEAN | FAST | {"grp.omega_rule": "linear", "grp.omega": 0.0},
        }
    ),
    # With less projection, or none: the adversarial prompt and target by themselves.
    "free": screen(
        {
            "w/o PR lr 3e-5": MEAN | FREE,
            "w/o PR lr 3e-5, k=4, gamma 1e-2": MEAN | FREE | {"prompt.tokens": 4, "prompt.gamma": 1e-2},
            "hypergradient lr 3e-5": MEAN | {"grp.omega_rule": "hypergradient", "grp.omega": 0.0},
            "omega 0.5 lr 5e-5": MEAN | {"grp.omega": 0.5, "learning_rate": 5e-5},
            "w/o PR lr 3e-5, k=4": MEAN | FREE | {"prompt.tokens": 4},
            "after Adam lr 1e-4": MEAN | FAST | {"grp.after_adam": True},
        }
    ),
    # The cross-attention alone, where ESD keeps most: with and without projection, weak and strong adversaries.
    "xattn": screen(
        {
            "xattn lr 1e-4": MEAN | FAST | XATTN,
            "xattn w/o PR lr 1e-4": MEAN | FAST | XATTN | FREE,
            "xattn lr 3e-4": MEAN | XATTN | {"learning_rate": 3e-4},
        }
    ),
    # Between the strong erasure of xattn without PR and the retention of ESD.
    "between": screen(
        {
            "xattn w/o PR lr 3e-5": MEAN | XATTN | FREE | {"learning_rate": 3e-5},
            "xattn w/o PR lr 3e-5, eta 0": MEAN | XATTN | FREE | {"learning_rate": 3e-5, "eta": 0.0},
        }
    ),
    # xattn at 3e-4 with omega 1 stands out: what its parts do there, and the other two concepts.
    "parts": screen(
        {
            "xattn lr 2e-4": MEAN | XATTN | {"learning_rate": 2e-4},
            "xattn lr 3e-4, hypergradient": BEST | RULE,
            "xattn lr 3e-4, omega 0.9": BEST | {"grp.omega": 0.9},
            "xattn lr 3e-4, w/o AET": BEST | {"aet.enabled": False},
            "xattn lr 3e-4, w/o adversarial prompt": BEST | {"prompt.enabled": False},
            "xattn lr 3e-4, AET repels": BEST | {"aet.current_weight": -1.0},
        }
    ),
    "red": screen(
        {
            "xattn lr 3e-4": BEST,
            "xattn lr 3e-4, hypergradient": BEST | RULE,
            "xattn lr 3e-4, omega 0.9": BEST | {"grp.omega": 0.9},
            "ESD xattn lr 1e-4": ESD | XATTN | FAST,
            "original": None,
        },
        ("red",),
    ),
    "striped": screen({"xattn lr 3e-4": BEST, "ESD xattn lr 1e-4": ESD | XATTN | FAST, "original": None}, ("striped",)),
    "star": screen({"original": None}),
    # The finalists, with what no choice has seen; ESD at its best among those that keep 95 % of the accuracy.
    "final": {
        "measure": FINAL,
        "seeds": (0, 1, 2),
        "concepts": ("star",),
        "settings": from_start({"AEGIS": BEST, "ESD": ESD | XATTN | FAST}),
    },
    "originals": {
        "measure": FINAL | {"attack": {"restarts": 0}},
        "seeds": (0,),
        "concepts": ("star",),
        "settings": {"no erasure": None},
    },
}
