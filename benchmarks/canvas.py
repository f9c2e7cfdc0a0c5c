"""Erasures of the canvas: what goes, what an attacker brings back, and what is kept, by its distance from what went.

    python -m benchmarks canvas                      things and styles, every preset of PRESETS, seeds 0 and 1
    python -m benchmarks canvas --concepts fox --presets esd aegis+ --seeds 0
    python -m benchmarks canvas --table              measures nothing, writes the tables of what there is
    python -m benchmarks canvas --matrix             40 things erased by a closed form: which hurts which
    python -m benchmarks canvas --many 1 10 40       so many things out of one model at once, by the presets of JOINT
    python -m benchmarks canvas --many 10 --presets 'uce, others preserved'     a closed form told what else there is
    python -m benchmarks canvas --unasked --concepts twemoji     what is shown unasked: the floor of any attack

Every preset runs at the scale of configs/canvas.py, which is that of the world. `aegis+near` was made on the fox, and
tried once on the wolf; else nothing is chosen on the canvas, and flowers, sports and musical instruments
(concepts.OUTSIDE) stand in a table of their own. Beside plain prompts, held-out words and soft prompts, an erasure is
asked for every thing in every hand once, as UnlearnCanvas does (`survey`; for the matrix and for many at once in half
of the hands). Of many the first three are attacked. Lines go to benchmarks/results/canvas.jsonl, a cell each; a run
that was stopped goes on there. The tables of docs/canvas.md come from here.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np

from aegis_jax.canvas.concepts import STYLES as HANDS
from aegis_jax.canvas.embedded import concepts_of
from benchmarks import canvas_table, cells, study, trials
from benchmarks.canvas_table import BASE

RESULT = "canvas.jsonl"
THINGS = ("fox", "owl", "turtle", "octopus", "butterfly", "banana", "burger", "castle", "bus", "moon")
STYLES = ("twemoji", "relief", "blob")
OUTSIDE = ("rose", "tennis", "guitar")
PRESETS = ("esd", "paper", "aegis+", "aegis+near", "uce")
SEEDS = (0, 1)
# Those of the family that were strongest on the world, and the one that is in every final there. An attack that is
# tuned to each defence has all members: --members all.
MEMBERS = ("alone-8-prediction", "before-8-prediction", "alone-8-denoising", "before-4-prediction")
SIZES = {"images": 64, "attack_steps": 100, "restarts": 2, "n": 16}
# Evaluation seeds by the erasure's seed: odd ones, as the world's finals have.
EVALUATIONS = {0: 41, 1: 43, 2: 45}
MATRIX = 40  # things
JOINT = ("uce", "speed", "aegis+near")
OTHERS = ", others preserved"  # behind a closed form's name: what it holds is every other thing, and the hands
STEPS_A_THING = 150  # of AEGIS for many at once, where that is more than for one
ATTACKED = 3  # of many


def grid(concepts, presets, seeds, members=MEMBERS) -> list[dict]:
    """The cells; what is before erasure is surveyed once a seed, whatever the concept."""
    bases = cells.grid(seed=seeds, preset=(BASE,), concept=("",))
    found = bases + cells.grid(seed=seeds, concept=concepts, preset=presets)
    how = {**SIZES, "members": sorted(members)}
    return [
        {**cell, "evaluation_seed": EVALUATIONS[cell["seed"]], "hands": len(HANDS), **(how if cell["concept"] else {}),
         "of": digest(cell, members)}
        for cell in found
    ]  # fmt: skip


def matrix(preset: str = "uce") -> list[dict]:
    """A cell for each of the catalogue's first things, erased and surveyed in half of the hands; no attack."""
    names = [thing.value.name for thing in concepts_of().things[:MATRIX]]
    axes = [{"seed": 0, "preset": BASE, "concept": ""}, *cells.grid(seed=(0,), preset=(preset,), concept=names)]
    return [{**cell, "evaluation_seed": 41, "hands": len(HANDS) // 2, "of": digest(cell, ())} for cell in axes]


def many(counts, presets=JOINT, members=MEMBERS) -> list[dict]:
    """A cell for the catalogue's first so many things, erased from one model, by each preset."""
    names = [thing.value.name for thing in concepts_of().things]
    axes = [{"seed": 0, "preset": BASE, "concept": ""}]
    axes += cells.grid(seed=(0,), concept=[",".join(names[:count]) for count in counts], preset=presets)
    how = {"evaluation_seed": EVALUATIONS[0], "hands": len(HANDS) // 2}
    attack = {**SIZES, "members": sorted(members)}
    return [
        {**cell, **how, **(attack if cell["concept"] else {}), "of": digest(cell, members if cell["concept"] else ())}
        for cell in axes
    ]


def settings(cell: dict):
    """What a cell's erasure runs with."""
    from aegis_jax.run import config

    given = {"concepts": cell["concept"], "method": cell["preset"].removesuffix(OTHERS), "seed": str(cell["seed"])}
    if cell["preset"].endswith(OTHERS):
        things = [thing.value.name for thing in concepts_of().things]
        given["preserve"] = ",".join([name for name in (*things, *HANDS) if name not in cell["concept"].split(",")])
    run, count = config.load("canvas", list(given.items())), cell["concept"].count(",") + 1
    if count > 1 and run.erase.steps > 1:  # a closed form has one
        run = config.merge(run, {"steps": max(run.erase.steps, STEPS_A_THING * count)})
    return run


def digest(cell: dict, members) -> str:
    """A hash of what the cell's names stand for: settings, the attack's members, the canvas's weights."""
    return digest_of(None if cell["preset"] == BASE else settings(cell), members, "canvas")


def digest_of(run, members, within: str) -> str:
    """The same of a run's settings, or of none, on an embedded world."""
    import aegis_jax
    from aegis_jax.attacks.family import family

    names = [f"{name}: {cells.stated(member)}" for name, member in sorted(family(members).items())]
    if run is not None:
        names.append(cells.stated(dataclasses.replace(run.erase, seed=0)))
    found = hashlib.sha256("".join(names).encode())
    weights = pathlib.Path(aegis_jax.__file__).parent / within / "weights"
    for path in sorted(weights.rglob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def measure(cell: dict) -> dict:
    """Erases, surveys, asks in held-out words, attacks. Shares are [count, n]; of many at once "each" concept has its
    own."""
    import aegis_jax

    seed = cell["evaluation_seed"]
    if cell["preset"] == BASE:
        return {"survey": survey(aegis_jax.load_pipeline("canvas"), seed, cell["hands"])}
    result = aegis_jax.erase("canvas", config=settings(cell))
    figures = {"survey": survey(result.pipeline, seed, cell["hands"]), "named": named(result)}
    if "images" not in cell:
        return figures
    if len(result.run.concepts) == 1:
        return figures | attacked(result, cell["concept"], cell)
    return figures | {"each": {name: attacked(result, name, cell) for name in result.run.concepts[:ATTACKED]}}


def attacked(result, concept: str, cell: dict) -> dict:
    """What is left of a concept in plain and held-out words, and under each member of the attack's family."""
    from aegis_jax.attacks.family import family
    from aegis_jax.evaluation import world
    from aegis_jax.evaluation.attacked import attack_family

    seed, figures = cell["evaluation_seed"], {}
    concept = world.find(concept, "canvas")
    asked = {held_out: world.concept_prompts(concept, cell["images"], seed, held_out=held_out) for held_out in (0, 1)}
    for held_out, prompts in asked.items():
        images = _sampled(result.pipeline, prompts, world.noise_seed(seed, held_out))
        hits = concept.world.judge("judge")(images)[concept.attribute] == concept.index
        figures[("plain", "held_out")[held_out]] = [int(hits.sum()), len(hits)]
    members = {name: dataclasses.replace(m, steps=cell["attack_steps"]) for name, m in family(cell["members"]).items()}
    how = {"seed": seed, "restarts": cell["restarts"], "n": cell["n"]}
    found = attack_family(result.original, result.pipeline, concept, members, **how)
    rates = {name: found[name]["rate"] for name in ("strongest", "worst_pick", "pick", "best")}
    return figures | rates | {"attack": found}


def survey(pipeline, seed: int, hands: int) -> dict:
    """Every thing in that many of its hands, in a seen word, one image each: what was asked for and what both judges
    see, "labels", "judge" and "second_judge", lists (n, 2) of thing and style."""
    from aegis_jax import worlds
    from aegis_jax.evaluation import world

    canvas = worlds.find("canvas")
    rng = np.random.default_rng([world.EVALUATION_SEED, seed, 7])
    chosen = np.sort(rng.permutation(len(HANDS))[:hands])
    labels = canvas.combinations[np.isin(canvas.combinations[:, 1], chosen)]
    prompts = [canvas.said(rng, row) for row in labels]
    images = _sampled(pipeline, prompts, world.noise_seed(seed, 2))
    seen = {"labels": labels[:, :2].tolist()}
    for name in ("judge", "second_judge"):
        answers = canvas.judge(name)(images)
        seen[name] = np.stack([answers["thing"], answers["style"]], axis=1).tolist()
    return seen


def _sampled(pipeline, prompts, seed):
    from aegis_jax.diffusion.sample import sample
    from aegis_jax.world.quality import GUIDANCE, STEPS

    return sample(pipeline, prompts, seed=seed, steps=STEPS, guidance=GUIDANCE)


def named(result) -> dict[str, list[str]] | None:
    """The words of the canvas's values that the run preserved in its random prompts, "drawn", and those that it could
    have, "drawable" (words that mean the concept are left out, and a vocabulary is a sample); None without such."""
    run, original = result.run, result.original
    if not getattr(run.erase, "draws_words", False):
        return None
    values = [value for row in run.world.attributes.values() for value in row]
    found = zip(("drawn", "drawable"), preserved(original, run.erase, list(run.concepts)))
    tokens = {word: set(original.tokenizer.tokens(word)) for value in values for word in value.words}
    return {kind: [word for word, mine in tokens.items() if mine <= ids] for kind, ids in found}


def preserved(original, config, concepts: list[str]) -> tuple[set[int], set[int]]:
    """Token ids: of the random prompts that a run of these settings preserves, drawn as its steps draw them, and of the
    vocabulary that they are drawn from."""
    import jax
    import jax.numpy as jnp

    from aegis_jax.erasure.aegis import words
    from aegis_jax.erasure.aegis.setup import freeze
    from aegis_jax.erasure.aegis.step import keys_of

    vocabulary = freeze(original, concepts, config).vocabulary
    # With a concept in context a prompt has less room; which concept is of no account where all are as long.
    inside = jnp.zeros(1, jnp.int32) if config.words.context != "none" else None

    def drawn(step):
        return words.random_ids(vocabulary, keys_of(jnp.uint32(config.seed), step).words, inside, batch=config.batch)

    ids = jax.lax.map(drawn, jnp.arange(config.steps))[:, : config.batch]
    return set(np.unique(ids).tolist()), set(np.unique(vocabulary.words[: int(vocabulary.size)]).tolist())


def check(concepts, presets) -> str | None:
    """What is wrong with these names, if anything is."""
    from aegis_jax.erasure.closed.room import METHODS as CLOSED
    from aegis_jax.erasure.presets import PRESETS as KNOWN

    of = concepts_of()
    for name in concepts:
        found = of.named(name)
        if len(found) != 1 or found[0][1] == "subgroup":
            return f"--concepts {name}: wanted things and styles of the canvas"
    told = [name.removesuffix(OTHERS) for name in presets if name.endswith(OTHERS)]
    if not all(name in CLOSED for name in told):
        return f"--presets: only closed forms are told what to preserve: {', '.join(CLOSED)}"
    unknown = [name for name in presets if name.removesuffix(OTHERS) not in KNOWN]
    return f"--presets {unknown[0]}: there are: {', '.join(KNOWN)}" if unknown else None


def main(argv: list[str]) -> None:
    options = trials.parser(__doc__, RESULT)
    options.add_argument("--concepts", nargs="+", default=(*THINGS, *STYLES, *OUTSIDE))
    options.add_argument("--presets", nargs="+", help=f"by default {' '.join(PRESETS)}; of many {' '.join(JOINT)}")
    options.add_argument("--seeds", nargs="+", type=int, choices=sorted(EVALUATIONS), default=SEEDS)
    options.add_argument("--members", nargs="+", default=MEMBERS, help="of the attack's family, or all")
    options.add_argument("--matrix", action="store_true", help="which thing's erasure hurts which other")
    options.add_argument("--many", type=int, nargs="+", metavar="N", help="things out of one model at once")
    options.add_argument("--unasked", action="store_true", help="what the model before erasure shows of --concepts")
    options.add_argument("--table", action="store_true", help="measures nothing")
    given = options.parse_args(argv)
    from aegis_jax.attacks.family import FAMILY

    presets = given.presets or (JOINT if given.many else PRESETS)
    wrong = check(given.concepts, presets)
    if given.many and not all(0 < count < concepts_of().count for count in given.many):
        wrong = f"--many {' '.join(map(str, given.many))}: wanted 1 to {concepts_of().count - 1} things"
    if wrong:
        options.error(wrong)
    if given.unasked:
        print(study.originals(given.concepts, "canvas", n=2 * SIZES["images"], seed=EVALUATIONS[0]))
        return
    members = FAMILY if given.members == ["all"] else given.members
    wanted, shown = grid(given.concepts, presets, given.seeds, members), canvas_table.text
    if given.matrix:
        wanted, shown = matrix(), canvas_table.of_matrix
    elif given.many:
        wanted, shown = many(given.many, presets, members), canvas_table.of_many
    if not given.table:
        cells.run(wanted, measure, given.out)
    keys = {cells.key(cell) for cell in wanted}
    lines = [line for line in cells.read(given.out) if cells.key(line["cell"]) in keys]
    print(shown(lines))
