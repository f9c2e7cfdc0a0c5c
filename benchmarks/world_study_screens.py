"""What the sets of cells are made of, the screenings, and the first finals (evaluation seeds 1 and 3)."""

from cells import FINAL, SCREEN

# What the first screening started from, in full: the world's config says by now what the study found.
START = {
    "steps": 250,
    "latents.refresh_every": 50,
    "learning_rate": 3e-5,
    "trainable": "full",
    "aet.init": "random",
    "prompt.init": "random",
    "prompt.tokens": 1,
    "prompt.prefixes": 1,
    "grp.retention": "grp",
    "grp.weight": 0.0,
    "grp.omega_rule": "fixed",
    "grp.omega": 1.0,
    "grp.mu": 0.01,
    "prompt.gamma": 1e-3,
    "prompt.context": False,
    "prompt.context_rate": 0.0,
    "preserve.weight": 0.0,
    "preserve.empty": 0.0,
}
ESD = {"aet.enabled": False, "prompt.enabled": False, "grp.retention": "none"}
MEAN = {"aet.init": "mean", "prompt.init": "mean"}
CENTRE = {"aet.init": "concept"}
FREE = {"grp.retention": "none"}
RULE = {"grp.omega_rule": "hypergradient", "grp.omega": 0.0}
RAMP = {"grp.omega_rule": "linear", "grp.omega": 0.0, "grp.mu": 0.004}
AFTER = {"grp.after_adam": True}
XATTN, KV = {"trainable": "xattn"}, {"trainable": "kv"}
K4 = {"prompt.tokens": 4}


def lr(rate: float) -> dict:
    return {"learning_rate": rate}


def pull(weight: float) -> dict:
    """Without DGR: the drift is pulled back all the time, in conflict or not."""
    return {"grp.retention": "constant", "grp.weight": weight}


CROSS = MEAN | XATTN  # what most cells share
PULL = CROSS | lr(1e-4) | pull(1e-2)
CONTEXT = {"latents.trajectories": 4, "latents.refresh_every": 15}  # as many trajectories as for one phrase
NAMED = CONTEXT | {"phrases": ["{}", "a red {}", "a blue striped {}", "a green dotted {}"]}
SAID = CONTEXT | {"phrases": ["{}", "a {} thing", "a {} figure", "a picture of a {} object"]}


def screen(settings: dict, concepts=("star",), seeds=(0,), measure=SCREEN) -> dict:
    return {"measure": measure, "seeds": seeds, "concepts": concepts, "settings": from_start(settings)}


def from_start(settings: dict) -> dict:
    return {name: changes if changes is None else START | changes for name, changes in settings.items()}


SETS = {
    # How strong can the attack be made against ESD? Fixed before anything of AEGIS is attacked.
    "attack": {
        "measure": {"images": 64, "evaluation_seed": 0},
        "seeds": (0,),
        "concepts": ("star",),
        "settings": from_start({"ESD": ESD | lr(1e-4)}),
        "attacks": [
            {"tokens": tokens, "learning_rate": rate, "restarts": 4, "steps": steps}
            for tokens, rate, steps in ((4, 1e-2, 100), (4, 3e-2, 100), (2, 1e-2, 100), (4, 3e-3, 100))
        ],
    },
    # ESD's own learning rate and tensors, so that AEGIS is compared with ESD at its best.
    "esd": screen(
        {
            f"ESD {tensors} lr {rate:g}": ESD | lr(rate) | {"trainable": tensors}
            for tensors, rate in (("full", 3e-5), ("full", 1e-4), ("xattn", 1e-4), ("xattn", 3e-4))
        }
    ),
    # The whole UNet, as in the paper: where soft tokens start, where the latents come from, how much is projected.
    "full": screen(
        {
            "random lr 3e-5": {},
            "mean lr 3e-5, latents of theta0": MEAN | {"latents.refresh_every": 0},
            "random lr 1e-4": lr(1e-4),
            "mean lr 1e-4": MEAN | lr(1e-4),
            "mean lr 2e-4": MEAN | lr(2e-4),
            "mean lr 1e-4, k=4": MEAN | lr(1e-4) | K4,
            "mean lr 3e-5, w/o PR": MEAN | FREE,
            "mean lr 3e-5, hypergradient": MEAN | RULE,
        }
    ),
    # The cross-attention alone, where ESD keeps most: every way of holding the drift back.
    "retention": screen(
        {
            "lr 1e-4": CROSS | lr(1e-4),
            "lr 2e-4": CROSS | lr(2e-4),
            "lr 3e-4": CROSS | lr(3e-4),
            "lr 3e-4, omega 0.9": CROSS | lr(3e-4) | {"grp.omega": 0.9},
            "lr 3e-4, hypergradient": CROSS | lr(3e-4) | RULE,
            "lr 1e-4, omega 0.5": CROSS | lr(1e-4) | {"grp.omega": 0.5},
            "lr 1e-4, linear": CROSS | lr(1e-4) | RAMP,
            "lr 1e-4, whole tree": CROSS | lr(1e-4) | {"grp.scope": "tree"},
            "lr 1e-4, after Adam": CROSS | lr(1e-4) | AFTER,
            "lr 2e-4, after Adam": CROSS | lr(2e-4) | AFTER,
            "lr 1e-4, w/o DGR 3e-3": CROSS | lr(1e-4) | pull(3e-3),
            "lr 1e-4, w/o DGR 5e-3": CROSS | lr(1e-4) | pull(5e-3),
            "lr 1e-4, w/o DGR 1e-2": PULL,
            "lr 2e-4, w/o DGR 1e-2": PULL | lr(2e-4),
            "lr 3e-5, w/o PR": CROSS | FREE,
            "lr 3e-5, w/o PR, eta 0": CROSS | FREE | {"eta": 0.0},
            "lr 6e-5, w/o PR": CROSS | FREE | lr(6e-5),
            "lr 8e-5, w/o PR": CROSS | FREE | lr(8e-5),
            "lr 1e-4, w/o PR": CROSS | FREE | lr(1e-4),
            "lr 1e-4, w/o PR, eta 0": CROSS | FREE | lr(1e-4) | {"eta": 0.0},
            "lr 1e-4, w/o PR, gamma 3e-4": CROSS | FREE | lr(1e-4) | {"prompt.gamma": 3e-4},
            "kv lr 2e-4, w/o PR": CROSS | FREE | KV | lr(2e-4),
        }
    ),
    "retention again": screen({"lr 8e-5, w/o PR": CROSS | FREE | lr(8e-5)}, seeds=(1,)),
    # What each part of the method does beside the pull (lr 1e-4, w/o DGR 1e-2).
    "parts": screen(
        {
            "w/o adversarial prompt": PULL | {"prompt.enabled": False},
            "w/o AET": PULL | {"aet.enabled": False},
            "AET repels": PULL | {"aet.current_weight": -1.0},
            "eta 2": PULL | {"eta": 2.0},
            "gamma 3e-3": PULL | {"prompt.gamma": 3e-3},
            "batch 8": PULL | {"batch": 8},
            "lr 5e-5, 500 steps": PULL | lr(5e-5) | {"steps": 500},
            "in context": PULL | NAMED,
            "k=2": PULL | {"prompt.tokens": 2},
            "k=2, in context": PULL | NAMED | {"prompt.tokens": 2},
            "k=4": PULL | K4,
            "k=4, in context": PULL | NAMED | K4,
            "k=4, c' from the concept": PULL | K4 | CENTRE,
            "k=4, w/o AET": PULL | K4 | {"aet.enabled": False},
            "k=4, w/o AET, w/o DGR 2e-2": PULL | K4 | {"aet.enabled": False} | pull(2e-2),
            "k=4, linear instead of w/o DGR": PULL | K4 | RAMP | {"grp.retention": "grp"},
        }
    ),
}
# How strong should the pull be? Attacked as long as in the finals, on the prompts of the screening.
SETS["pull"] = screen(
    {f"k=4, c' from the concept, w/o DGR {w:g}": CROSS | lr(1e-4) | K4 | CENTRE | pull(w) for w in (4e-3, 7e-3)}
    | {"k=4, c' from the concept, linear lr 3e-5": CROSS | K4 | CENTRE | RAMP},
    measure={"images": 128, "evaluation_seed": 0},
)

# A colour and a texture.
ESD_BEST = ESD | XATTN | lr(1e-4)
SETS["kinds"] = screen(
    {
        "ESD xattn lr 1e-4": ESD_BEST,
        "k=4, w/o DGR 1e-2": PULL | K4,
        "k=4, c' from the concept, w/o DGR 1e-2": PULL | K4 | CENTRE,
        "k=4, c' from the concept, w/o DGR 3e-3, in context": PULL | K4 | CENTRE | SAID | pull(3e-3),
    },
    ("red", "striped"),
)
SETS["red"] = screen(
    {
        "lr 3e-4": CROSS | lr(3e-4),
        "lr 3e-4, omega 0.9": CROSS | lr(3e-4) | {"grp.omega": 0.9},
        "lr 3e-4, hypergradient": CROSS | lr(3e-4) | RULE,
        "lr 3e-4, hypergradient, c' from the concept": CROSS | lr(3e-4) | CENTRE | RULE,
        "lr 2e-4, linear, c' from the concept": CROSS | lr(2e-4) | CENTRE | RAMP,
        "lr 2e-4, linear, c' from the concept, in context": CROSS | lr(2e-4) | CENTRE | RAMP | SAID,
        "k=4, w/o DGR 1e-2, w/o AET": PULL | K4 | {"aet.enabled": False},
        "k=4, w/o DGR 1e-2, c' from the concept, beta 3e-3": PULL | K4 | CENTRE | {"aet.beta": 3e-3},
        "k=4, w/o DGR 1e-2, beta 1e-2": PULL | K4 | {"aet.beta": 1e-2},
    },
    ("red",),
)
SETS["striped"] = screen({"lr 2e-4, linear, c' from the concept": CROSS | lr(2e-4) | CENTRE | RAMP}, ("striped",))


def final(settings: dict, evaluation_seed: int, seeds=(0, 1, 2), **measure) -> dict:
    return screen(settings, ("star",), seeds, FINAL | {"evaluation_seed": evaluation_seed} | measure)


# What no choice had seen: other prompts, noise, words and starts of the attack.
SETS["final"] = final(
    {
        "ESD": ESD_BEST,
        "AEGIS k=1, lr 3e-4, omega 1": CROSS | lr(3e-4),
        "AEGIS k=4, w/o DGR 1e-2": PULL | K4 | CENTRE,
    },
    1,
)
SETS["final, original"] = final({"no erasure": None}, 1, seeds=(0,), attack={"restarts": 0})
# Does a weaker pull withstand more? Seen after the finals, so again with prompts and starts of its own.
SETS["weaker pull"] = final({"AEGIS k=4, w/o DGR 7e-3": CROSS | lr(1e-4) | K4 | CENTRE | pull(7e-3)}, 3)
SETS["weaker pull, ESD"] = final({"ESD": ESD_BEST}, 3, seeds=(1,))
# Four prefixes of their own start, instead of one.
SETS["four prefixes"] = final(
    {
        "k=4, c' from the concept, w/o DGR 7e-3, four prefixes": CROSS
        | lr(1e-4)
        | K4
        | CENTRE
        | pull(7e-3)
        | CONTEXT
        | {"prompt.init": "random", "phrases": ["{}"] * 4}
    },
    2,
    seeds=(1,),
    images=128,
)

# What withstands an attack? Eight starts of the attack, and prompts that no earlier set has used.
MANY = {"images": 64, "evaluation_seed": 4, "attack": {"restarts": 8, "steps": 100}}
BASE = CROSS | lr(1e-4) | K4 | CENTRE
APART = CONTEXT | {"prompt.init": "random", "phrases": ["{}"] * 4}  # four prefixes with latents of their own
FOUR = {"prompt.init": "random", "prompt.prefixes": 4}  # which share the latents
LONG = {"steps": 500}
SETS["withstand"] = screen(
    {
        "ESD": ESD_BEST,
        "pull 7e-3, four prefixes apart, 500 steps": BASE | pull(7e-3) | APART | LONG,
        "pull 1e-2, four prefixes apart, 500 steps": BASE | pull(1e-2) | APART | LONG,
        "pull 1e-2, gamma 3e-3, four prefixes apart, 500 steps": BASE
        | pull(1e-2)
        | APART
        | LONG
        | {"prompt.gamma": 3e-3},
        "pull 1e-2, 500 steps": BASE | pull(1e-2) | LONG,
        "pull 1e-2, four prefixes apart, 500 steps, 2 trajectories each": BASE
        | pull(1e-2)
        | APART
        | LONG
        | {"latents.trajectories": 2},
        "pull 1.5e-2, gamma 3e-3, four prefixes apart, 500 steps, 2 trajectories each": BASE
        | pull(1.5e-2)
        | APART
        | LONG
        | {"latents.trajectories": 2, "prompt.gamma": 3e-3},
        "ESD, 500 steps": ESD_BEST | LONG,
        "pull 1e-2, four prefixes, 500 steps": BASE | pull(1e-2) | FOUR | LONG,
        "pull 1e-2, four prefixes, 500 steps, 16 trajectories": BASE
        | pull(1e-2)
        | FOUR
        | LONG
        | {"latents.trajectories": 16},
        "pull 1.3e-2, gamma 2e-3, four prefixes, 500 steps": BASE | pull(1.3e-2) | FOUR | LONG | {"prompt.gamma": 2e-3},
    },
    measure=MANY,
)
ONE = BASE | FREE | FOUR | lr(2e-4) | {"prompt.tokens": 1}
SETS["withstand, red"] = screen(
    {
        "ESD lr 2e-4": ESD_BEST | lr(2e-4),
        "ESD lr 6e-4": ESD_BEST | lr(6e-4),
        "k=1, hypergradient, lr 6e-4": CROSS | RULE | lr(6e-4),
        "w/o PR, four prefixes": BASE | FREE | FOUR,
        "k=1, w/o PR, lr 2e-4, four prefixes": ONE,
        "k=1, w/o PR, lr 2e-4, four prefixes, eta 2": ONE | {"eta": 2.0},
    },
    ("red",),
    measure=MANY,
)
SETS["withstand, striped"] = screen(
    {
        "pull 3e-3, four prefixes, 500 steps": BASE | pull(3e-3) | FOUR | LONG,
        "pull 3e-3, four prefixes apart, 500 steps": BASE | pull(3e-3) | APART | LONG,
    },
    ("striped",),
    measure=MANY,
)
