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
KV = {"trainable": "kv"}
DECAY = {"grp.retention": "constant"}
PULL = MEAN | XATTN | FAST | DECAY | {"grp.weight": 1e-2}
K4 = PULL | {"prompt.tokens": 4}
CENTRE = {"aet.init": "concept"}
RAMP = {"grp.retention": "grp", "grp.omega_rule": "linear", "grp.omega": 0.0, "grp.mu": 0.004}
LINEAR = MEAN | XATTN | CENTRE | RAMP
SAID = {
    "phrases": ["{}", "a {} thing", "a {} figure", "a picture of a {} object"],
    "latents.trajectories": 4,
    "latents.refresh_every": 15,
}
CONTEXT = {
    "phrases": ["{}", "a red {}", "a blue striped {}", "a green dotted {}"],
    "latents.trajectories": 4,
    "latents.refresh_every": 15,
}
AFTER = {"grp.after_adam": True}
BEST = MEAN | XATTN | {"learning_rate": 3e-4}
STRONG = {"prompt.tokens": 4, "prompt.gamma": 1e-2}


def screen(settings: dict, concepts=("star",), seeds=(0,)) -> dict:
    return {"measure": SCREEN, "seeds": seeds, "concepts": concepts, "settings": from_start(settings)}


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
    "gentle": screen(
        {
            "xattn after Adam lr 2e-4": MEAN | XATTN | AFTER | {"learning_rate": 2e-4},
            "kv w/o PR lr 2e-4": MEAN | KV | FREE | {"learning_rate": 2e-4},
            "xattn after Adam lr 1e-4": MEAN | XATTN | AFTER | FAST,
            "xattn w/o PR lr 6e-5": MEAN | XATTN | FREE | {"learning_rate": 6e-5},
            "xattn w/o PR lr 1e-4, gamma 3e-4": MEAN | XATTN | FREE | FAST | {"prompt.gamma": 3e-4},
            "xattn w/o PR lr 1e-4, eta 0": MEAN | XATTN | FREE | FAST | {"eta": 0.0},
            "ESD kv lr 3e-4": ESD | KV | {"learning_rate": 3e-4},
            "kv lr 1e-3": MEAN | KV | {"learning_rate": 1e-3},
            "xattn tree lr 1e-4": MEAN | XATTN | FAST | {"grp.scope": "tree"},
            "xattn linear lr 1e-4": MEAN
            | XATTN
            | FAST
            | {"grp.omega_rule": "linear", "grp.omega": 0.0, "grp.mu": 0.004},
        },
        seeds=(0, 1),
    ),
    "pull": screen(
        {
            "xattn w/o DGR 3e-3 lr 1e-4": MEAN | XATTN | FAST | DECAY | {"grp.weight": 3e-3},
            "xattn w/o PR lr 8e-5": MEAN | XATTN | FREE | {"learning_rate": 8e-5},
            "xattn tree lr 1e-4": MEAN | XATTN | FAST | {"grp.scope": "tree"},
            "xattn w/o DGR 1e-2 lr 1e-4": MEAN | XATTN | FAST | DECAY | {"grp.weight": 1e-2},
            "xattn linear lr 1e-4": MEAN
            | XATTN
            | FAST
            | {"grp.omega_rule": "linear", "grp.omega": 0.0, "grp.mu": 0.004},
            "xattn omega 0.5 lr 1e-4": MEAN | XATTN | FAST | {"grp.omega": 0.5},
            "xattn w/o PR lr 1e-4, gamma 3e-4": MEAN | XATTN | FREE | FAST | {"prompt.gamma": 3e-4},
            "xattn w/o PR lr 6e-5": MEAN | XATTN | FREE | {"learning_rate": 6e-5},
        },
        seeds=(0, 1),
    ),
    "levers": screen(
        {
            "pull 1e-2 lr 1e-4, w/o AET": PULL | {"aet.enabled": False},
            "pull 1e-2 lr 1e-4, in context": PULL | CONTEXT,
            "pull 1e-2 lr 1e-4, k=2": PULL | {"prompt.tokens": 2},
            "pull 1e-2 lr 1e-4, batch 8": PULL | {"batch": 8},
            "pull 1e-2 lr 1e-4, w/o adversarial prompt": PULL | {"prompt.enabled": False},
            "pull 1e-2 lr 1e-4, eta 2": PULL | {"eta": 2.0},
            "pull 1e-2 lr 1e-4, gamma 3e-3": PULL | {"prompt.gamma": 3e-3},
            "pull 1e-2 lr 1e-4, AET repels": PULL | {"aet.current_weight": -1.0},
            "pull 1e-2 lr 2e-4": PULL | {"learning_rate": 2e-4},
            "pull 1e-2 lr 5e-5, 500 steps": PULL | {"learning_rate": 5e-5, "steps": 500},
            "pull 5e-3 lr 1e-4": PULL | {"grp.weight": 5e-3},
        },
    ),
    "prefix": screen(
        {
            "pull 1e-2 lr 1e-4, k=4": PULL | {"prompt.tokens": 4},
            "pull 1e-2 lr 1e-4, k=2, in context": PULL | CONTEXT | {"prompt.tokens": 2},
            "pull 2e-2 lr 1e-4, k=4, w/o AET": PULL | {"prompt.tokens": 4, "aet.enabled": False, "grp.weight": 2e-2},
            "pull 1e-2 lr 1e-4, k=2, gamma 3e-3": PULL | {"prompt.tokens": 2, "prompt.gamma": 3e-3},
            "pull 1e-2 lr 1e-4, k=3": PULL | {"prompt.tokens": 3},
            "pull 2e-2 lr 1e-4, k=2, w/o AET": PULL | {"prompt.tokens": 2, "aet.enabled": False, "grp.weight": 2e-2},
            "omega 0.5 lr 8e-5, k=2": MEAN | XATTN | {"learning_rate": 8e-5, "grp.omega": 0.5, "prompt.tokens": 2},
            "pull 1e-2 lr 1e-4, k=2, random": PULL
            | {"prompt.tokens": 2, "prompt.init": "random", "aet.init": "random"},
        },
    ),
    "kinds": screen({"pull 1e-2 lr 1e-4, k=4": K4, "ESD xattn lr 1e-4": ESD | XATTN | FAST}, ("red", "striped")),
    "k4": screen(
        {
            "pull 1e-2 lr 1e-4, k=4, in context": K4 | CONTEXT,
            "linear lr 1e-4, k=4": K4 | RAMP,
            "pull 1e-2 lr 1e-4, k=8": PULL | {"prompt.tokens": 8},
            "hypergradient lr 1e-4, k=4": K4 | RULE | {"grp.retention": "grp"},
        },
    ),
    "k4 again": screen({"pull 1e-2 lr 1e-4, k=4": K4, "pull 1e-2 lr 1e-4, k=4, in context": K4 | CONTEXT}, seeds=(1,)),
    # Colours stay: the target built on c' near the empty prompt pushes too little. So c' starts at the concept, or not.
    "centre red": screen(
        {
            "k=4, c' from the concept": K4 | CENTRE,
            "k=4, w/o AET": K4 | {"aet.enabled": False},
            "k=4, c' from the concept, beta 3e-3": K4 | CENTRE | {"aet.beta": 3e-3},
            "k=4, beta 1e-2": K4 | {"aet.beta": 1e-2},
        },
        ("red",),
    ),
    "centre": screen(
        {
            "k=4, c' from the concept": K4 | CENTRE,
            "k=4, w/o AET": K4 | {"aet.enabled": False},
            "k=4, c' from the concept, pull 2e-2": K4 | CENTRE | {"grp.weight": 2e-2},
        },
        ("star", "striped"),
    ),
    "star": screen({"original": None}),
    # The finalists, with what no choice has seen; ESD at its best among those that keep 95 % of the accuracy.
    "first final": {
        "measure": FINAL,
        "seeds": (0, 1, 2),
        "concepts": ("star",),
        "settings": from_start({"AEGIS": BEST, "ESD": ESD | XATTN | FAST}),
    },
    "final": {
        "measure": FINAL,
        "seeds": (0, 1, 2),
        "concepts": ("star",),
        "settings": from_start({"AEGIS w/o DGR, k=4": K4 | CENTRE}),
    },
    # Nothing but nouns that say nothing around the concept, the prefix shorter: attributes are said before a noun.
    "attributes": screen(
        {
            "k=1, c' from the concept, linear lr 2e-4": LINEAR | {"learning_rate": 2e-4},
            "k=1, c' from the concept, linear lr 2e-4, in context": LINEAR | SAID | {"learning_rate": 2e-4},
            "k=4, c' from the concept, pull 3e-3, in context": K4 | CENTRE | SAID | {"grp.weight": 3e-3},
        },
        ("red", "striped"),
    ),
    "originals": {
        "measure": FINAL | {"attack": {"restarts": 0}},
        "seeds": (0,),
        "concepts": ("star",),
        "settings": {"no erasure": None},
    },
}
