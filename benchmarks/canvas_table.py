"""Tables of benchmarks/canvas.py, of lines alone: no model is read."""

import statistics
from collections.abc import Iterable

import numpy as np
from scipy.stats import spearmanr

from aegis_jax.canvas.concepts import Concepts
from benchmarks import trials

THING, STYLE = 0, 1
BASE = "before erasure"
RINGS = ("same subgroup", "same group", "other things", "other styles")
ASKED = ("plain", "held_out")
ATTACKED = ("strongest", "worst_pick", "pick")
TITLES = {
    "plain": "plain", "held_out": "held-out words", "strongest": "attacked: mean of the strongest member",
    "worst_pick": "worst member's pick", "pick": "attacker's pick", "UA": "UA", "IRA": "IRA", "CRA": "CRA",
}  # fmt: skip


def where(concept: str, concepts: Concepts) -> tuple[int, int]:
    """(`THING` or `STYLE`, index) of a concept by its name."""
    ((_, attribute, index),) = concepts.named(concept)
    return ("thing", "style").index(attribute), index


def kept(survey: dict, concept: str, concepts: Concepts) -> dict[str, np.ndarray]:
    """Of a survey, {figure: truths}: UA, IRA and CRA as UnlearnCanvas defines them with thing and style as domains
    (metrics.canvas; CRA of the images without the concept), and of each ring of other values what is still shown."""
    axis, index = where(concept, concepts)
    labels, answers = np.asarray(survey["labels"]), np.asarray(survey["judge"])
    right, asked = labels == answers, labels[:, axis] == index
    found = {"UA": ~right[asked, axis], "IRA": right[~asked, axis], "CRA": right[~asked, 1 - axis]}
    for name, ring in concepts.rings(("thing", "style")[axis], index).items():
        found[name] = right[np.isin(labels[:, axis], ring), axis]
    return found


def figures(line: dict, concept: str, concepts: Concepts) -> dict[str, float]:
    """A line's shares in [0, 1] by title; a base's line has only what its survey tells of the concept."""
    of = line["figures"]
    found = {name: count / n for name in ASKED if name in of for count, n in [of[name]]}
    found |= {name: of[name] for name in ATTACKED if name in of}
    return found | {name: float(x.mean()) for name, x in kept(of["survey"], concept, concepts).items()}


def by_name(named: Iterable[str], survey: dict, concept: str, concepts: Concepts) -> dict[str, np.ndarray]:
    """{"named", "unnamed": whether each image of them shows it}: other things, by whether a word of theirs was among
    the preserved random words."""
    labels, answers = np.asarray(survey["labels"]), np.asarray(survey["judge"])
    axis, index = where(concept, concepts)
    words = set(named)
    told = np.array([bool(words & set(thing.value.words)) for thing in concepts.things])[labels[:, THING]]
    right, other = labels[:, THING] == answers[:, THING], labels[:, axis] != index
    return {"named": right[other & told], "unnamed": right[other & ~told]}


def text(lines: list[dict], outside) -> str:
    """Markdown: means over concepts of things, styles and what no setting was chosen on; every concept; words."""
    concepts = Concepts()
    bases = {line["cell"]["seed"]: line for line in lines if not line["cell"]["concept"]}
    erased = [line for line in lines if line["cell"]["concept"]]
    groups = {
        "things": [line for line in erased if _kind(line, concepts) == THING and not _of(line, outside)],
        "styles": [line for line in erased if _kind(line, concepts) == STYLE],
        "things of subgroups kept apart": [line for line in erased if _of(line, outside)],
    }
    parts = [
        f"**{name.capitalize()}**, means in per cent:\n\n{means(mine, bases, concepts)}"
        for name, mine in groups.items()
        if mine
    ]
    parts.append(f"**Each**, means over seeds in per cent:\n\n{each(erased, concepts)}")
    parts.append(f"**Random words**, per cent of images of the other things:\n\n{words(erased, bases, concepts)}")
    return "\n\n".join([trials_of(lines), *parts])


def _kind(line: dict, concepts: Concepts) -> int:
    return where(line["cell"]["concept"], concepts)[0]


def _of(line: dict, names) -> bool:
    return line["cell"]["concept"] in names


def trials_of(lines: list[dict]) -> str:
    """Machines, versions and dates of lines."""
    if not lines:
        return "Nothing measured yet."
    about = [line["about"] for line in lines]
    each = lambda values: ", ".join(dict.fromkeys(map(str, values)))  # noqa: E731
    dates, hours = sorted(found["date"] for found in about), sum(line["seconds"] for line in lines) / 3600
    machines = each(f"{found['cores']} cores of {found['cpu']}" for found in about)
    versions = each(found["versions"]["jax"] for found in about)
    return (
        f"{len(lines)} cells in {hours:.1f} h, {dates[0]} to {dates[-1]}, {machines}; jax {versions}, revision "
        f"{each(found['revision'] for found in about)}."
    )


def _row(values: list[dict], columns) -> list[str]:
    shown = []
    for column in columns:
        have = [row[column] for row in values if column in row]
        shown.append(f"{100 * statistics.fmean(have):.0f}" if have else "-")
    return shown


def _columns(rows: list[dict]) -> list[str]:
    order = (*ASKED, *ATTACKED, "UA", "IRA", "CRA", *RINGS)
    return [column for column in order if any(column in row for row in rows)]


def means(lines: list[dict], bases: dict[int, dict], concepts: Concepts) -> str:
    """A row a preset, means over concepts and seeds; first what the base draws of the same concepts."""
    rows: dict[str, list[dict]] = {}
    for seed, concept in dict.fromkeys((line["cell"]["seed"], line["cell"]["concept"]) for line in lines):
        if seed in bases:
            rows.setdefault(BASE, []).append(figures(bases[seed], concept, concepts))
    for line in lines:
        rows.setdefault(line["cell"]["preset"], []).append(figures(line, line["cell"]["concept"], concepts))
    columns = _columns([row for mine in rows.values() for row in mine])
    head = ["preset", "concepts x seeds", *(TITLES.get(column, f"kept: {column}") for column in columns)]
    return trials.table(head, [[name, len(mine), *_row(mine, columns)] for name, mine in rows.items()])


def each(lines: list[dict], concepts: Concepts) -> str:
    """A row a concept and preset."""
    rows: dict[tuple, list[dict]] = {}
    for line in lines:
        cell = line["cell"]
        rows.setdefault((cell["concept"], cell["preset"]), []).append(figures(line, cell["concept"], concepts))
    columns = _columns([row for mine in rows.values() for row in mine])
    head = ["concept", "preset", "seeds", *(TITLES.get(column, f"kept: {column}") for column in columns)]
    return trials.table(head, [[*key, len(mine), *_row(mine, columns)] for key, mine in sorted(rows.items())])


def words(lines: list[dict], bases: dict[int, dict], concepts: Concepts) -> str:
    """A row a preset: other things of which a random word of `aegis+` was one, and which none was. Presets without
    such words are split by those of the line that has them, for the same concept and seed."""
    key = lambda line: (line["cell"]["concept"], line["cell"]["seed"])  # noqa: E731
    named = {key(line): line["figures"]["named"] for line in lines if line["figures"].get("named") is not None}
    rows: dict[str, dict[str, list]] = {}
    for (concept, seed), told in named.items():
        mine = [line for line in lines if key(line) == (concept, seed)]
        for line in [bases[seed], *mine] if seed in bases else mine:
            of = rows.setdefault(line["cell"]["preset"], {"named": [], "unnamed": []})
            for name, right in by_name(told, line["figures"]["survey"], concept, concepts).items():
                of[name].append(right)
    shown = []
    for name, of in rows.items():
        pooled = [np.concatenate(of[kind]) for kind in ("named", "unnamed")]
        shown.append([name, len(of["named"]), *(f"{100 * x.mean():.1f} of {len(x)}" for x in pooled)])
    return trials.table(["preset", "erasures", "a preserved word named it", "none did"], shown)


def of_matrix(lines: list[dict]) -> str:
    """Markdown: the pairs where one thing's erasure hurt another most, and how far that follows from text alone."""
    concepts = Concepts()
    base = next((line["figures"]["survey"] for line in lines if not line["cell"]["concept"]), None)
    erased = {line["cell"]["concept"]: line["figures"]["survey"] for line in lines if line["cell"]["concept"]}
    if base is None or not erased:
        return "Nothing measured yet."
    lost = {name: _by_thing(base) - _by_thing(survey) for name, survey in erased.items()}
    like = text_similarity(concepts)
    names = [thing.value.name for thing in concepts.things]
    pairs = [
        (float(lost[name][i]), float(like[names.index(name), i]), name, other)
        for name in lost
        for i, other in enumerate(names)
        if other != name
    ]
    worst = sorted(pairs, reverse=True)[:15]
    own = statistics.fmean(float(lost[name][names.index(name)]) for name in lost)
    harm, cosine = np.array([pair[:2] for pair in pairs]).T
    kin = np.array([_kin(concepts, a, b) for *_, a, b in pairs])
    head = ["erased", "hurt", "fewer images that show it", "cosine of the two words"]
    table = trials.table(head, [[a, b, f"{100 * hurt:.0f} %", f"{cos:.2f}"] for hurt, cos, a, b in worst])
    return (
        f"{trials_of(lines)}\n\n{len(lost)} erasures, each of {len(names)} things: the erased thing itself loses "
        f"{100 * own:.0f} points on average, another of its subgroup {100 * harm[kin].mean():.1f}, any other "
        f"{100 * harm[~kin].mean():.1f}. Rank correlation of harm with the words' similarity: "
        f"{spearmanr(harm, cosine).statistic:.2f}.\n\n{table}"
    )


def _by_thing(survey: dict) -> np.ndarray:
    labels, answers = np.asarray(survey["labels"]), np.asarray(survey["judge"])
    right = labels[:, THING] == answers[:, THING]
    count = np.bincount(labels[:, THING])
    return np.bincount(labels[:, THING], right, len(count)) / count


def _kin(concepts: Concepts, one: str, other: str) -> bool:
    indices = [where(name, concepts)[1] for name in (one, other)]
    return concepts.subgroup_of[indices[0]] == concepts.subgroup_of[indices[1]]


def text_similarity(concepts: Concepts) -> np.ndarray:
    """(things, things) cosines of the things' words by the canvas's text encoder, less the mean of all."""
    import aegis_jax
    from aegis_jax.diffusion.conditioning import encode

    pipeline = aegis_jax.load_pipeline("canvas")
    names = [thing.value.name for thing in concepts.things]
    ids = np.asarray(pipeline.tokenizer.ids(names))
    states = np.asarray(encode(pipeline, names).embedding)
    ends = (ids == pipeline.tokenizer.eos_token_id).argmax(1)
    rows = states[np.arange(len(names)), ends]
    rows = rows - rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T
