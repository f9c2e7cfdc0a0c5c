"""Erasure and retention on an embedded world, as its judge sees them.

For a concept that is one value of one attribute (star of shape), over generated images:

  plain       share that still shows the value, prompts with the words an erasure may use
  held_out    the same for prompts with the value's held-out synonyms
  same        accuracy on the attribute for prompts with its *other* values
  other       accuracy on the other domains (interface.py: the world's two other attributes) for those same prompts
  agreement   share of all these images and attributes on which the second judge says the same as the first
  agreement_shown   share of the plain and held-out images on which both judges agree whether the value is shown

What is shown without being asked for is `unasked`'s; what soft prompts bring back is in attacked.py.
Evaluation prompts and start noise come from seeds of their own (`EVALUATION_SEED` up), apart from those of training.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from aegis_jax import worlds
from aegis_jax.diffusion.sample import sample
from aegis_jax.world.concepts import Value
from aegis_jax.world.interface import EmbeddedWorld
from aegis_jax.world.quality import GUIDANCE, STEPS

EVALUATION_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Concept:
    """A value of an attribute of an embedded world, which `within` names."""

    attribute: str
    index: int
    within: str = "world"

    @property
    def world(self) -> EmbeddedWorld:
        return worlds.find(self.within)

    @property
    def axis(self) -> int:
        return list(self.world.attributes).index(self.attribute)

    @property
    def value(self) -> Value:
        return self.world.attributes[self.attribute][self.index]


def find(text: str, within: str = "world") -> Concept | None:
    """The concept that a text names by exactly one attribute value ("star", "a red thing"), or None."""
    found = worlds.find(within).named(text)
    return Concept(*found[0][1:], within) if len(found) == 1 else None


def concept_prompts(
    concept: Concept, n: int, seed: int, *, held_out: bool = False, word: str | None = None
) -> list[str]:
    """n prompts that name the concept; the other attributes are said with seen words, or left unsaid now and then.

    word: a control's, which stands in place of the concept's in the same prompts.
    """
    rng = np.random.default_rng([EVALUATION_SEED, seed, 1 + held_out])
    # One held-out word per seed: what is tuned on even seeds is measured on the odd ones' words.
    words = concept.value.held_out[seed % 2 :][:1] if held_out else concept.value.seen
    prompts = []
    for _ in range(n):
        drawn = rng.choice(words)  # for a control too, so that the rest of its prompts stays the same
        prompts.append(concept.world.prompt(rng, concept.axis, drawn if word is None else word))
    return prompts


def other_prompts(concept: Concept, n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """n fully stated prompts with the other values of the attribute, balanced, and their labels (n, 3)."""
    rng = np.random.default_rng([EVALUATION_SEED, seed, 3])
    rows = concept.world.combinations
    rows = rows[rows[:, concept.axis] != concept.index]
    labels = np.concatenate([rng.permutation(rows) for _ in range(-(-n // len(rows)))])[:n]
    return [concept.world.said(rng, row) for row in labels], labels


def remaining_prompts(erased: Sequence[Concept], n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """n fully stated prompts with none of several erased values, balanced, and their labels (n, 3); none where these
    are all values of an attribute."""
    rng = np.random.default_rng([EVALUATION_SEED, seed, 5])
    world = erased[0].world
    gone = np.any([world.combinations[:, concept.axis] == concept.index for concept in erased], axis=0)
    rows = world.combinations[~gone]
    times = -(-n // len(rows)) if len(rows) else 1
    labels = np.concatenate([rng.permutation(rows) for _ in range(times)])[:n]
    return [world.said(rng, row) for row in labels], labels


def open_prompts(concept: Concept, n: int, seed: int) -> list[str]:
    """n prompts that state the other attributes, with seen words, and say nothing of the concept's own."""
    rng = np.random.default_rng([EVALUATION_SEED, seed, 4])
    return [concept.world.left_open(rng, concept.axis) for _ in range(n)]


def _shows(answers: dict, concept: Concept) -> np.ndarray:
    return answers[concept.attribute] == concept.index


def _rate(answers: dict, concept: Concept) -> float:
    return float(np.mean(_shows(answers, concept)))


def measure(pipeline, concept: Concept, *, n: int = 200, seed: int = 0) -> dict:
    """The figures as shares in [0, 1]; "plain", "held_out", "same" and "other" over n images each.

    "same_each" is "same" for each other value of the attribute, {name: share}.
    """
    world = concept.world
    judged, second = world.judge("judge"), world.judge("second_judge")
    agreed, shown = [], []

    def answers(prompts, kind):
        images = sample(pipeline, prompts, seed=noise_seed(seed, kind), steps=STEPS, guidance=GUIDANCE)
        first, other = judged(images), second(images)
        agreed.extend(np.mean(first[a] == other[a]) for a in world.attributes)
        shown.append(np.mean(_shows(first, concept) == _shows(other, concept)))
        return first

    plain = answers(concept_prompts(concept, n, seed), 0)
    held_out = answers(concept_prompts(concept, n, seed, held_out=True), 1)
    prompts, labels = other_prompts(concept, n, seed)
    kept = answers(prompts, 2)
    right = {a: kept[a] == labels[:, k] for k, a in enumerate(world.attributes)}
    same, value = right.pop(concept.attribute), labels[:, concept.axis]
    values = world.attributes[concept.attribute]
    return {
        "plain": _rate(plain, concept),
        "held_out": _rate(held_out, concept),
        "same": float(np.mean(same)),
        "same_each": {v.name: float(same[value == i].mean()) for i, v in enumerate(values) if (value == i).any()},
        "other": float(np.mean([right[a] for a in right if a in world.domains])),
        "agreement": float(np.mean(agreed)),
        "agreement_shown": float(np.mean(shown[:2])),
    }


def measure_several(pipeline, erased: Sequence[Concept], *, n: int = 200, seed: int = 0) -> dict:
    """Of one model without several values: "plain" and "held_out", {value's name: share that shows it}, and "kept", the
    accuracy on the world's domains of prompts that name none of them, NaN where no such prompt is left; n images each.
    """
    world = erased[0].world
    judged = world.judge("judge")

    def answers(prompts, kind):
        images = sample(pipeline, prompts, seed=noise_seed(seed, kind), steps=STEPS, guidance=GUIDANCE)
        return judged(images)

    found: dict = {"plain": {}, "held_out": {}}
    for kind, (name, rates) in enumerate(found.items()):
        for concept in erased:
            asked = concept_prompts(concept, n, seed, held_out=name == "held_out")
            rates[concept.value.name] = _rate(answers(asked, kind), concept)
    prompts, labels = remaining_prompts(erased, n, seed)
    kept = answers(prompts, 2) if prompts else {}
    right = [kept[a] == labels[:, k] for k, a in enumerate(world.attributes) if prompts and a in world.domains]
    return found | {"kept": float(np.mean(right)) if prompts else float("nan")}


def kept_by_ring(pipeline, concept: Concept, *, n: int = 64, seed: int = 0) -> dict[str, float]:
    """{how far from the concept: share of n images that show what they are asked for, of its attribute}.

    n fully stated prompts for each of the world's rings of other values, nearest first.
    """
    world, found = concept.world, {}
    rows, judged = world.combinations, world.judge("judge")
    for k, (name, ring) in enumerate(world.rings(concept.attribute, concept.index).items()):
        rng = np.random.default_rng([EVALUATION_SEED, seed, 6, k])
        mine = rows[np.isin(rows[:, concept.axis], ring)]
        labels = np.concatenate([rng.permutation(mine) for _ in range(-(-n // len(mine)))])[:n]
        prompts = [world.said(rng, row) for row in labels]
        images = sample(pipeline, prompts, seed=noise_seed(seed, 2), steps=STEPS, guidance=GUIDANCE)
        found[name] = float(np.mean(judged(images)[concept.attribute] == labels[:, concept.axis]))
    return found


def unasked(pipeline, concept: Concept, *, n: int = 200, seed: int = 0) -> dict:
    """How often the value is shown to a prompt that does not ask for it, shares in [0, 1] over n images each.

    "open": prompts that state the other attributes and leave this one open; "empty": the empty prompt. An attack
    gets as much from a prompt that says nothing, so its figures are to be read against these.
    """
    prompts = open_prompts(concept, n, seed)
    shown = concept.world.judge("judge")
    rates = {}
    for kind, (name, texts) in enumerate({"open": prompts, "empty": [""] * n}.items(), 5):
        images = sample(pipeline, texts, seed=noise_seed(seed, kind), steps=STEPS, guidance=GUIDANCE)
        rates[name] = _rate(shown(images), concept)
    return rates


def noise_seed(seed: int, kind: int) -> int:
    """Of the start noise of one kind of image under an evaluation seed: `measure` has 0 to 2, attacked.py 3 and 4,
    `unasked` 5 and 6, cases.py 7 and 8."""
    return EVALUATION_SEED + 10 * seed + kind


# From where on `world_table` says so in words: of an erased value, the share of images that still show it; of an
# accuracy, what it has fallen by. Few images, and no floor of what is shown unasked: a first look, no verdict.
SHOWN, LOST = 0.05, 0.10
_ROWS = {
    "plain": ("concept, plain prompts", "erase"),
    "held_out": ("concept, held-out synonyms", "erase"),
    "same": ("accuracy, other values of the attribute", "keep"),
    "other": ("accuracy, the other attributes", "keep"),
}


def world_table(before, after, names: Sequence[str], *, n: int = 32, seed: int = 0, within: str = "world") -> str:
    """A small before/after table for two pipelines of a world, n images a figure (32: a batch for each of 2 cores).

    names: the concepts that were erased; of one that is no single value of the world it says that nothing judges it. A
    line names what is still shown (`SHOWN`), and another what is lost (`LOST`).
    """
    found = {name: find(name, within) for name in names}
    known = list(dict.fromkeys(concept for concept in found.values() if concept))
    lines = [
        f"{name!r} is not one value of the {within}: its judge cannot measure it" for name in found if not found[name]
    ]
    rows = []
    if len(known) == 1:
        left, right = (measure(pipeline, known[0], n=n, seed=seed) for pipeline in (before, after))
        rows = [(text, left[key], right[key], want) for key, (text, want) in _ROWS.items()]
    elif known:
        left, right = (measure_several(pipeline, known, n=n, seed=seed) for pipeline in (before, after))
        for name in left["plain"]:
            rows.append((f"{name}, plain prompts", left["plain"][name], right["plain"][name], "erase"))
            rows.append((f"{name}, held-out synonyms", left["held_out"][name], right["held_out"][name], "erase"))
        rows.append(("accuracy, prompts without any of them", left["kept"], right["kept"], "keep"))
    if rows:
        lines.append(f"{f'{n} images a figure, judged':42}{'before':>8}{'after':>8}")
    table = [f"{text:42}{a:>8.1%}{b:>8.1%}  ({want})" for text, a, b, want in rows]
    return "\n".join(lines + table + _failures(rows, n))


def _failures(rows, n: int) -> list[str]:
    """A line for what a table of n images a figure still shows, and one for what it has lost, if there is any."""
    shown = [f"{text} {b:.0%}" for text, _, b, want in rows if want == "erase" and b > SHOWN]
    lost = [f"{text} {a:.0%} to {b:.0%}" for text, a, b, want in rows if want == "keep" and a - b > LOST]
    found = []
    if shown:
        found.append(f"STILL SHOWN, in more than {SHOWN:.0%} of {n} images: {'; '.join(shown)}")
    if lost:
        found.append(f"LOST, more than {100 * LOST:.0f} points: {'; '.join(lost)}")
    return found
