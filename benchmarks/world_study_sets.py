"""The cells that benchmarks/world_study.py runs: which settings, concepts and seeds, and how many images.

Here the finals and what was run beside them, from evaluation seed 5 on; what came before is in world_study_screens.py.
"""

import world_study_screens
from cells import FINAL
from world_study_screens import BASE, CROSS, ESD_BEST, FOUR, FREE, LONG, MANY, RULE, lr, pull, screen

from aegis_jax.world.concepts import ATTRIBUTES

SETS = dict(world_study_screens.SETS)

# The first finals after the screenings: judges trained anew, prompts, noise, words and starts of the attack that no
# screening used.
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
