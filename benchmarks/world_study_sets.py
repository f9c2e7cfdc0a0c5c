"""The cells that benchmarks/world_study.py runs: which settings, concepts and seeds, and how many images."""

from cells import FINAL, SCREEN

from aegis_jax.world.concepts import ATTRIBUTES

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

# The figures of README.md: judges trained anew, prompts, noise, words and starts of the attack that no screening used.
FRESH = FINAL | {"evaluation_seed": 5}
SETS["final star"] = screen(
    {"ESD": ESD_BEST, "AEGIS k=4, four prefixes, w/o DGR 1e-2": BASE | pull(1e-2) | FOUR | LONG},
    ("star",),
    (0, 1, 2),
    FRESH,
)
SETS["final striped"] = screen(
    {"ESD": ESD_BEST, "AEGIS k=4, four prefixes, w/o DGR 3e-3": BASE | pull(3e-3) | FOUR | LONG},
    ("striped",),
    (0, 1, 2),
    FRESH,
)
SETS["final red"] = screen(
    {"ESD": ESD_BEST, "AEGIS k=1, hypergradient, lr 3e-4": CROSS | RULE | lr(3e-4)}, ("red",), (0, 1, 2), FRESH
)
SETS["final originals"] = screen(
    {"no erasure": None}, ("star", "red", "striped"), (0,), FRESH | {"attack": {"restarts": 0}}
)

# What random words draw is preserved, instead of a pull: one recipe for all concepts.
PRESERVE = {"preserve.weight": 3.0}
WORDS = BASE | FREE | FOUR | LONG | PRESERVE | {"prompt.gamma": 5e-3}
SETS["final, words preserved"] = screen({"AEGIS, words preserved": WORDS}, ("star", "red", "striped"), (0, 1, 2), FRESH)
# Also the concept among random words (not the phrases of the first screening).
WEIGHT_3 = WORDS | {"prompt.context": True}
# Begun as finals, and stopped after the star's second seed, where less was kept than with ESD: hence the weight below.
SETS["final, among words, weight 3"] = screen(
    {"ESD": ESD_BEST, "AEGIS, among words, weight 3": WEIGHT_3},
    ("star", "red", "striped"),
    (0, 1, 2),
    FINAL | {"evaluation_seed": 7},
)
# Prompts, noise and starts of the attack that no choice has seen.
AMONG_WORDS = WEIGHT_3 | {"preserve.weight": 5.0}
FRESHER = FINAL | {"evaluation_seed": 9}
SETS["final, among words"] = screen(
    {"ESD": ESD_BEST, "AEGIS, among words": AMONG_WORDS}, ("star", "red", "striped"), (0, 1, 2), FRESHER
)
SETS["final, among words, originals"] = screen(
    {"no erasure": None}, ("star", "red", "striped"), (0,), FRESHER | {"attack": {"restarts": 0}}
)
# The empty prompt among those that are preserved, a share that was chosen on the square; prompts of the finals above.
EMPTY = AMONG_WORDS | {"preserve.empty": 0.35}
SETS["final, empty prompt preserved"] = screen(
    {"AEGIS, empty prompt preserved": EMPTY}, ("star", "red", "striped"), (0, 1, 2), FRESHER
)
# All other values of the world, plain prompts only; no setting was tuned on them, but the heart was looked at.
PLAIN_ONLY = FRESHER | {"images": 128, "attack": {"restarts": 0}}
SETS["among words, every other value"] = screen(
    {"AEGIS, among words": AMONG_WORDS, "ESD": ESD_BEST},
    tuple(v.name for values in ATTRIBUTES.values() for v in values if v.name not in ("star", "red", "striped")),
    measure=PLAIN_ONLY,
)
SETS["every other value, empty prompt preserved"] = screen(
    {"AEGIS, empty prompt preserved": EMPTY},
    tuple("square plain gradient heart circle green cross moon triangle blue ring yellow cyan purple dotted".split()),
    measure=PLAIN_ONLY,
)
# With the push in context that follows what is left there, and the empty prompt preserved: prompts, noise and starts of
# the attack that no choice had seen.
FOLLOWED = EMPTY | {"prompt.context_rate": 0.5}
FRESHEST = FINAL | {"evaluation_seed": 15}
SETS["final, followed"] = screen({"AEGIS": FOLLOWED}, ("star", "red", "striped"), (0, 1, 2), FRESHEST)
SETS["final, followed, ESD"] = screen({"ESD": ESD_BEST}, ("star",), (0, 1, 2), FRESHEST)
SETS["final, followed, originals"] = screen(
    {"no erasure": None}, ("star", "red", "striped"), (0,), FRESHEST | {"attack": {"restarts": 0}}
)
SETS["followed, every other value"] = screen(
    {"AEGIS": FOLLOWED},
    tuple("square heart plain gradient green circle cross moon triangle blue ring yellow cyan purple dotted".split()),
    measure=FRESHEST | {"images": 128, "attack": {"restarts": 0}},
)
# By judges that know what lies between the values (chosen on erased models, with other prompts); prompts, noise and
# starts that no choice had seen.
JUDGED_ANEW = FINAL | {"evaluation_seed": 17}
SETS["final, judged anew"] = screen(
    {"AEGIS": FOLLOWED, "ESD": ESD_BEST}, ("star", "red", "striped"), (0, 1, 2), JUDGED_ANEW
)
SETS["final, judged anew, originals"] = screen(
    {"no erasure": None}, ("star", "red", "striped"), (0,), JUDGED_ANEW | {"attack": {"restarts": 0}}
)
# By judges that are means of four networks each (chosen by how they agree on erased models, with other prompts).
JUDGED_BY_FOUR = FINAL | {"evaluation_seed": 19}
SETS["final, judged by four"] = screen(
    {"AEGIS": FOLLOWED, "ESD": ESD_BEST}, ("star", "red", "striped"), (0, 1, 2), JUDGED_BY_FOUR
)
SETS["final, judged by four, originals"] = screen(
    {"no erasure": None}, ("star", "red", "striped"), (0,), JUDGED_BY_FOUR | {"attack": {"restarts": 0}}
)
# What each part of the recipe does, beside the finals of seed 0 (nothing was chosen by these).
SETS["followed, parts"] = screen(
    {
        "w/o AET": FOLLOWED | {"aet.enabled": False},
        "w/o adversarial prompts": FOLLOWED | {"prompt.enabled": False, "prompt.prefixes": 1},
        "not in context": FOLLOWED | {"prompt.context": False, "prompt.context_rate": 0.0},
        "w/o preservation": FOLLOWED | {"preserve.weight": 0.0},
        "with DGR": FOLLOWED | RULE | {"grp.retention": "grp"},
        "the paper's parts alone": CROSS | lr(1e-4) | LONG | RULE,
        "ESD, preserved and in context": ESD_BEST
        | LONG
        | {"preserve.weight": 5.0, "preserve.empty": 0.35, "prompt.context": True, "prompt.context_rate": 0.5},
        "w/o the push that follows": FOLLOWED | {"prompt.context_rate": 0.0},
        "w/o the empty prompt": FOLLOWED | {"preserve.empty": 0.0},
    },
    ("star", "red", "striped"),
    measure=JUDGED_ANEW,
)
# Without the words near the star (triangle, cross, heart, moon and theirs): of the other shapes only ring, square and
# circle are among the random words then.
SETS["followed, star's neighbours unsaid"] = screen(
    {"similar 0.15": FOLLOWED | {"preserve.similar": 0.15}}, measure=JUDGED_ANEW
)
# What each part did before.
ESD_MORE = ESD_BEST | LONG | {"preserve.weight": 5.0}
SETS["among words, parts"] = screen(
    {
        "AEGIS, among words": AMONG_WORDS,
        "not among words": AMONG_WORDS | {"prompt.context": False},
        "w/o AET": AMONG_WORDS | {"aet.enabled": False},
        "w/o prefixes": AMONG_WORDS | {"prompt.enabled": False, "prompt.prefixes": 1},
        "w/o preservation": AMONG_WORDS | {"preserve.weight": 0.0},
        "with DGR": AMONG_WORDS | {"grp.retention": "grp"},
        "ESD, words preserved": ESD_MORE,
        "ESD, words preserved, among words": ESD_MORE | {"prompt.context": True},
    },
    ("star", "red"),
    measure=MANY,
)
