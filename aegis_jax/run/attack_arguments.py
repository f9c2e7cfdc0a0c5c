"""The arguments of `aegis attack`, which has many: a method's own are refused with another. Imports nothing heavy."""

from aegis_jax.run.judge_arguments import SPEC

# name: (type, help). Absent, each is what the method has, so that one that is given can be told from one that is not.
SETTINGS = {
    "tokens": (int, "learnt tokens in the prompt, or words"),
    "place": (
        str,
        "where they stand. soft-prompt, word-search: before or behind the concept, alone, or before a neutral word "
        "instead of it (neutral); by prompt: prefix_k, suffix_k, mid_k, insert_k or per_k_words",
    ),
    "goal": (str, "soft-prompt: denoising, or prediction: that of the --original"),
    "restarts": (int, "attacks from different starts"),
    "batch": (int, "images per restart and step"),
    "steps": (int, "in all"),
    "timesteps": (int, "unlearndiffatk, p4d-hard-prompt, recall: how many are gone through, ascending"),
    "iterations": (int, "steps at each of them; tina: at each step of DDIM"),
    "check_every": (int, "p4d-n, p4d-k: steps between two looks"),
    "judged": (int, "p4d-n, p4d-k: images by which the prompt that was kept is judged"),
    "learning_rate": (float, "of the optimiser"),
    "weight_decay": (float, "likewise"),
    "update": (str, "unlearndiffatk: adam or sign"),
    "initial": (str, "cce: the word that the learnt token starts as"),
    "texts": (str, "cce: what stands around it: object, style, person or plain"),
    "eta": (float, "ring-a-bell, -embedding: how far prompts are shifted by the concept"),
    "search": (str, "word-search: evolution or random"),
    "budget": (int, "word-search: pictures of a restart, all in all"),
    "per_query": (int, "word-search: pictures of a phrase in a generation"),
    "picked": (int, "word-search: pictures by which each of the last phrases is picked"),
    "population": (int, "ring-a-bell, word-search: individuals"),
    "generations": (int, "ring-a-bell: of these"),
    "crossover": (float, "ring-a-bell: the share that has children"),
    "mutation": (float, "ring-a-bell: the share of which a token is replaced"),
    "balance": (float, "recall: share of the picture in the latent's start"),
    "interval": (int, "recall: timesteps after which a share of the picture is added"),
    "strength": (float, "recall: share of DDIM's steps that a picture is noised back by"),
    "direction": (str, "recall: ascend, as its code does, or descend"),
    "levels": (str, "noise-, completion-probe: shares of DDIM's steps that are left, or done by the original"),
    "masks": (str, "inpainting-probe: which halves are known, of left, right, top and bottom"),
    "looks": (str, "revival: steps of fine-tuning after which the concept is asked for, as 50,100"),
    "seed": (int, "of all that is drawn"),
}


# As attacks.METHODS, which a test holds them to.
METHODS = (
    "soft-prompt", "unlearndiffatk", "p4d-hard-prompt", "p4d-n", "p4d-k", "cce", "tina", "ring-a-bell",
    "ring-a-bell-embedding", "word-search", "ladder", "recall", "noise-probe", "completion-probe", "inpainting-probe",
    "revival",
)  # fmt: skip


def add(sub, model_help: str) -> None:
    """Adds all of them but --model to a parser."""
    sub.add_argument("--concept", metavar="TEXT", required=True, help="what was erased")
    sub.add_argument("--method", default="soft-prompt", metavar="NAME", help=f"one of: {', '.join(METHODS)}")
    sub.add_argument("--images", metavar="DIR", help="pictures of the concept")
    sub.add_argument(
        "--prompts", metavar="FILE",
        help="attacks by prompt, with --images: a prompt for each picture; by default the prompts.csv beside them",
    )  # fmt: skip
    sub.add_argument("--ladder", metavar="FILE", help="ladder, with --images: a .csv of wordings, columns rung, prompt")
    sub.add_argument(
        "--without", metavar="DIR",
        help="with --images: pictures that do not show the concept, and the prompts.csv beside them, if there is one; "
        "revival fine-tunes on them, recall and the probes take them as a control",
    )  # fmt: skip
    sub.add_argument("--cases", metavar="N", type=int, help="likewise, on the world: how many prompts (16)")
    sub.add_argument("--out", metavar="DIR", help="what comes out, and all to replay it (with --images: attack)")
    sub.add_argument("--original", metavar="M", help=f"the model before erasure: {model_help}; by default the world's")
    sub.add_argument("--neutral", metavar="WORD", help="a control: this word in place of the concept's")
    sub.add_argument("--guidance", type=float, help="with --images: of the images that come out (7.5; of the world 3)")
    sub.add_argument("--image-steps", type=int, help="likewise, their DDIM steps (50; of the world 25)")
    sub.add_argument("--judge", metavar="SPEC", help=f"with --images: {SPEC}")
    sub.add_argument("--judge-label", metavar="TEXT", help="its label that counts as success (default: the concept)")
    settings = sub.add_argument_group("settings of the methods (by default as published; docs/attacks.md)")
    for name, (kind, text) in SETTINGS.items():
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        settings.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)


def given(args) -> dict:
    """The settings that the user gave."""
    return {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
