"""The canvas as a training sees it (tools/world/subject.py): its drawings, captions, tokens and judges."""

import functools
import json
import pathlib
import re
import types

import numpy as np
from safetensors.numpy import load_file, save_file

from aegis_jax.canvas import captions, clip, tokenizer
from aegis_jax.canvas.captions import BROAD, KIN, OWN
from aegis_jax.canvas.concepts import Concepts, catalogue
from aegis_jax.world import judge
from aegis_jax.world.concepts import NONE
from tools.canvas import architectures, fetch, judges, pictures
from tools.world.subject import Subject

NOTICE = pathlib.Path(captions.__file__).parent / "NOTICE"
# How the things.tsv puts emojibase's smallest subgroups together.
TOGETHER = {
    "place-religious": "place-building", "writing": "office", "book-paper": "office", "lock": "tool",
    "medical": "science", "award-medal": "event", "food-asian": "food-prepared",
}  # fmt: skip
# For CLIP the style is left unsaid more often, and the subgroup named: single words must mean something on their own.
NAMING_CLIP = {OWN: 0.74, KIN: 0.14, BROAD: 0.06, captions.OPEN: 0.06}
CARD = """---
library_name: diffusers
license: other
license_name: apache-2.0-with-notice
tags: [stable-diffusion, aegis_jax]
---

# The canvas of aegis_jax

A small Stable Diffusion for measuring concept erasure on any laptop: 32x32 pictures of {things} things, each as the
artists of six emoji sets draw it. NOTICE names the sets and their licences, two of which want attribution. Beside the
pipeline lie `judge/`, `second_judge/` (classifiers of thing, style and subgroup) and `clip/` (CLIP's image tower and
projection; its text tower is the text encoder), which diffusers ignores. How it was trained, with times and
accuracies: `canvas.json`.
"""


def drawings(folder: pathlib.Path, concepts: Concepts, log=print) -> dict[str, np.ndarray]:
    """What npm brought, rastered once and kept in `folder`/drawings.safetensors.

    "things": uint8 (things, 6, 96, 96, 4); "others": the same of emoji that are none of the catalogue's things nor
    share a word with one; "kin": (others,) the index of each one's subgroup, or -1.
    """
    path = folder / "drawings.safetensors"
    if path.exists():
        kept = load_file(path)
        if len(kept["things"]) == concepts.count:
            return kept
    found = fetch.packages(folder, log)
    sets, entries = fetch.Sets(found), fetch.names(found[fetch.NAMES])
    # Of clocks there is one for every half hour, so none at all.
    free = [e for e in entries if e["subgroup"] != "time" and not _words(e) & _known()]
    others = [entry for entry in free if sets.has(entry["code"])]
    log(f"drawing {concepts.count} things and {len(others)} others in {len(fetch.HANDS)} hands")

    def every_hand(codes):
        rows = ([pictures.raster(sets.drawing(hand, code)) for hand in fetch.HANDS] for code in codes)
        return np.stack([np.stack(row) for row in rows])

    kin = [TOGETHER.get(entry["subgroup"], entry["subgroup"]) for entry in others]
    made = {
        "things": every_hand([thing.code for thing in concepts.things]),
        "others": every_hand([entry["code"] for entry in others]),
        "kin": np.array([concepts.subgroups.index(name) if name in concepts.subgroups else NONE for name in kin]),
    }
    save_file(made, path)
    return made


def _words(entry: dict) -> set[str]:
    return {word for text in (entry["label"], *entry["tags"]) for word in re.findall("[a-z]+", text.lower())}


@functools.cache
def _known() -> set[str]:
    return {word for thing in catalogue() for word in thing.value.words}


def canvas(drawn: dict[str, np.ndarray], concepts: Concepts) -> Subject:
    """The subject of a canvas of `concepts`, drawn as in `drawings`."""

    def draw(rng, n):
        labels = concepts.combinations[rng.integers(0, len(concepts.combinations), n)]
        return pictures.place(rng, drawn["things"][labels[:, 0], labels[:, 1]]), labels

    outputs = sum(judge.classes(concepts.attributes))
    configs = {name: config | {"outputs": outputs} for name, config in architectures.JUDGES.items()}
    return Subject(
        name="canvas",
        command=f"python -m tools.canvas.train --things {concepts.count}",
        architectures=types.SimpleNamespace(**vars(architectures) | {"JUDGES": configs}),
        attributes=concepts.attributes,
        draw=draw,
        captions=functools.partial(_captions, concepts),
        clip_captions={"empty": 0.0, "unsaid": 0.35, "naming": tuple(NAMING_CLIP.values())},
        true_of=functools.partial(captions.true_of, concepts=concepts),
        encode=tokenizer.encode,
        longest=tokenizer.longest(captions.words(), captions.LONGEST),
        survives=(1,),
        material=functools.partial(judges.material, drawn, concepts),
        class_ids=functools.partial(clip.class_ids, concepts),
        write_tokenizer=tokenizer.write,
        card=CARD.format(things=concepts.count),
        files={"NOTICE": NOTICE.read_text("utf-8"), "concepts.json": json.dumps({"things": concepts.count}) + "\n"},
    )


def _captions(concepts, rng, labels, **shares):
    return captions.sample(rng, labels, concepts, **shares)
