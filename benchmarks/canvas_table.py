"""Tables of benchmarks/canvas.py, of lines alone: no erased model is read."""

import statistics

import numpy as np
from scipy.stats import spearmanr

from aegis_jax.canvas.concepts import OUTSIDE, Concepts
from aegis_jax.canvas.embedded import concepts_of
from aegis_jax.evaluation.metrics.canvas import accuracies
from benchmarks import trials

DOMAINS = ("thing", "style")
THING, STYLE = range(2)
BASE = "before erasure"
RINGS = ("same subgroup", "same group", "other things", "other styles")
COLUMNS = {
    "plain": "plain", "held_out": "held-out words", "strongest": "attacked: mean of the strongest member",
    "worst_pick": "worst member's pick", "pick": "attacker's pick", "UA": "UA", "IRA": "IRA",
    "CRA_retained": "CRA, retained", **{ring: f"kept: {ring}" for ring in RINGS},
}  # fmt: skip
ATTACKS = ("strongest", "worst_pick", "pick")


def where(concept: str, concepts: Concepts) -> tuple[int, int]:
    """(`THING` or `STYLE`, index) of a concept by its name."""
    ((_, attribute, index),) = concepts.named(concept)
    return DOMAINS.index(attribute), index


def kept(survey: dict, concept: str, concepts: Concepts) -> dict[str, float]:
    """Of a survey, shares in [0, 1]: UA, IRA and CRA_retained (metrics.canvas) with thing and style as domains, and of
    each ring of the concept's other values how many images still show what they are asked for."""
    axis, index = where(concept, concepts)
    labels, answers = np.asarray(survey["labels"]), np.asarray(survey["judge"])
    asked, answered = (dict(zip(DOMAINS, rows.T)) for rows in (labels, answers))
    shares = accuracies(asked, answered, DOMAINS[axis], index)
    found = {name: shares[name]["share"] for name in ("UA", "IRA", "CRA_retained")}
    right = labels[:, axis] == answers[:, axis]
    rings = concepts.rings(DOMAINS[axis], index)
    return found | {name: float(right[np.isin(labels[:, axis], ring)].mean()) for name, ring in rings.items()}


def figures(line: dict, concept: str, concepts: Concepts) -> dict[str, float]:
    """A line's shares in [0, 1] by column; a base's line has only what its survey tells of the concept."""
    of = line["figures"]
    found = {name: of[name][0] / of[name][1] for name in ("plain", "held_out") if name in of}
    found |= {name: of[name] for name in ("strongest", "worst_pick", "pick") if name in of}
    return found | kept(of["survey"], concept, concepts)


def by_name(named: dict, survey: dict, concept: str, concepts: Concepts) -> dict[str, np.ndarray]:
    """{"drawn", "left": whether each image of them shows its thing}: other things of which a word could have been
    preserved, by whether one was. Which it was is chance, so that the two differ in nothing else."""
    labels, answers = np.asarray(survey["labels"]), np.asarray(survey["judge"])
    has = lambda kind: np.array([bool(set(named[kind]) & set(t.value.words)) for t in concepts.things])  # noqa: E731
    axis, index = where(concept, concepts)
    other, drawn = has("drawable")[labels[:, THING]], has("drawn")[labels[:, THING]]
    other &= labels[:, axis] != index
    right = labels[:, THING] == answers[:, THING]
    return {"drawn": right[other & drawn], "left": right[other & ~drawn]}


def text(lines: list[dict]) -> str:
    """Markdown: means over concepts of things, of styles and of what no setting was chosen on; every concept; words."""
    concepts = concepts_of()
    bases = {line["cell"]["seed"]: line for line in lines if not line["cell"]["concept"]}
    groups: dict[str, list[dict]] = {"things": [], "styles": [], "things of subgroups kept apart": []}
    for line in (line for line in lines if line["cell"]["concept"]):
        axis, index = where(line["cell"]["concept"], concepts)
        apart = axis == THING and concepts.things[index].subgroup in OUTSIDE
        groups["things of subgroups kept apart" if apart else ("things", "styles")[axis]].append(line)
    erased = [line for mine in groups.values() for line in mine]
    parts = [
        f"**{name.capitalize()}**, means in per cent over the concepts and seeds that every preset here has:\n\n"
        f"{means(mine, bases, concepts)}"
        for name, mine in groups.items()
        if mine
    ]
    parts.append(f"**Each**, means over seeds in per cent:\n\n{each(erased, concepts)}")
    parts.append(f"**Random words**, other things in per cent, means over erasures:\n\n{words(lines, concepts)}")
    return "\n\n".join([provenance(lines), *parts])


def provenance(lines: list[dict]) -> str:
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


def table(rows: dict[tuple, list[dict]], head: list[str]) -> str:
    """A row for each key, means of its figures in per cent."""
    columns = [column for column in COLUMNS if any(column in row for mine in rows.values() for row in mine)]

    def shown(mine, column):
        have = [row[column] for row in mine if column in row]
        return f"{100 * statistics.fmean(have):.0f}" if have else "-"

    body = [[*key, len(mine), *(shown(mine, column) for column in columns)] for key, mine in rows.items()]
    return trials.table([*head, *(COLUMNS[column] for column in columns)], body)


def means(lines: list[dict], bases: dict[int, dict], concepts: Concepts) -> str:
    """A row a preset, of what all of them have; first what the base draws of the same concepts."""
    has: dict[str, dict[tuple, dict]] = {}
    for line in lines:
        cell = line["cell"]
        has.setdefault(cell["preset"], {})[cell["concept"], cell["seed"]] = line
    common = [key for key in next(iter(has.values())) if all(key in mine for mine in has.values())]
    rows = {(BASE,): [figures(bases[seed], concept, concepts) for concept, seed in common if seed in bases]}
    rows |= {(name,): [figures(mine[key], key[0], concepts) for key in common] for name, mine in has.items()}
    return table({key: mine for key, mine in rows.items() if mine}, ["preset", "concepts x seeds"])


def each(lines: list[dict], concepts: Concepts) -> str:
    """A row a concept and preset."""
    rows: dict[tuple, list[dict]] = {}
    for line in lines:
        cell = line["cell"]
        rows.setdefault((cell["concept"], cell["preset"]), []).append(figures(line, cell["concept"], concepts))
    return table(dict(sorted(rows.items())), ["concept", "preset", "seeds"])


def words(lines: list[dict], concepts: Concepts) -> str:
    """A row a preset: other things whose word a run preserved, and those whose words it could have and did not. What
    has no such words is split by another preset's of the same concept and seed, as is the base."""
    own = {}
    for line in lines:
        if line["figures"].get("named"):
            own.setdefault((line["cell"]["concept"], line["cell"]["seed"]), line["figures"]["named"])
    rows: dict[str, list[dict]] = {}
    for (concept, seed), named in own.items():
        for line in lines:
            cell, figures = line["cell"], line["figures"]
            if cell["seed"] == seed and cell["concept"] in ("", concept):
                split = by_name(figures.get("named") or named, figures["survey"], concept, concepts)
                rows.setdefault(cell["preset"], []).append(split)

    def shown(name: str, kind: str) -> str:
        have = [split[kind] for split in rows[name] if len(split[kind])]
        if not have:
            return "-"
        images = statistics.fmean(map(len, have))
        return f"{100 * statistics.fmean(float(x.mean()) for x in have):.1f} ({images:.0f} images an erasure)"

    head = ["preset", "erasures", "a word of theirs was preserved", "none was, though it could have been"]
    body = [[name, len(of), *(shown(name, kind) for kind in ("drawn", "left"))] for name, of in rows.items()]
    return trials.table(head, body)


def of_matrix(lines: list[dict]) -> str:
    """Markdown: how much an erasure takes of other things, the pairs where it takes most, and whether the words'
    similarity tells which (by rank; its null: the same with the erased things' similarities exchanged)."""
    concepts = concepts_of()
    base = next((line["figures"]["survey"] for line in lines if not line["cell"]["concept"]), None)
    erased = {line["cell"]["concept"]: line["figures"]["survey"] for line in lines if line["cell"]["concept"]}
    if base is None or not erased:
        return "Nothing measured yet."
    names = [thing.value.name for thing in concepts.things]
    at = np.array([names.index(name) for name in erased])
    harm = np.stack([by_thing(base) - by_thing(survey) for survey in erased.values()])  # (erased, things)
    like, others = text_similarity(names)[at], np.arange(len(names)) != at[:, None]
    kin = (concepts.subgroup_of[at][:, None] == concepts.subgroup_of) & others
    rng = np.random.default_rng(0)
    rank = lambda like: float(spearmanr(harm[others], like[others]).statistic)  # noqa: E731
    null = [rank(like[rng.permutation(len(like))]) for _ in range(200)]
    # Ties in the catalogue's order.
    pairs = [divmod(int(k), len(names)) for k in np.argsort(-np.where(others, harm, -np.inf), axis=None, kind="stable")]
    least, (_, last) = pairs[:15], pairs[14:16]
    ties = int((harm[others] == harm[last]).sum())
    rows = [[names[at[i]], names[j], f"{100 * harm[i, j]:.0f}", f"{like[i, j]:.2f}"] for i, j in least]
    own, near, far = (100 * harm[of].mean() for of in (~others, kin, others & ~kin))
    low, high = np.quantile(null, [0.025, 0.975])
    return (
        f"{provenance(lines)}\n\n{len(erased)} erasures, {len(base['labels']) // len(names)} images of each of "
        f"{len(names)} things: the erased thing loses {own:.0f} points on average, others of its subgroup {near:.1f}, "
        f"the rest {far:.1f}. Rank correlation of what is lost with the words' similarity: {rank(like):.2f} "
        f"(exchanged: {low:.2f} to {high:.2f}). The fifteen pairs that "
        f"lost most ({ties} pairs are level with the last):\n\n"
        + trials.table(["erased", "hurt", "points lost", "cosine of the words"], rows)
    )


def of_many(lines: list[dict]) -> str:
    """Markdown: of so many things erased from one model, what is still shown and what is kept: things of a subgroup
    that lost one, all other things, and the hands of both; in per cent of images. Attacks: means over the attacked."""
    concepts = concepts_of()
    names = [thing.value.name for thing in concepts.things]
    base = next((line["figures"]["survey"] for line in lines if not line["cell"]["concept"]), None)
    rows = []
    for line in (line for line in lines if line["cell"]["concept"]):
        gone = np.isin(np.arange(len(names)), [names.index(name) for name in line["cell"]["concept"].split(",")])
        near = ~gone & np.isin(concepts.subgroup_of, concepts.subgroup_of[gone])
        for name, survey in (("before", base), (line["cell"]["preset"], line["figures"]["survey"])):
            if survey is not None:
                of = line["figures"]  # of one thing, its attack's figures are there themselves
                attacks = () if survey is base else of.get("each", {}).values() or [of] * ("strongest" in of)
                rows.append((int(gone.sum()), name, *_parts(survey, gone, near), *_attacks(attacks)))
    head = ["things erased", "by", "still shown", "kept: their subgroups", "kept: the rest", "hands of what is kept"]
    head += [COLUMNS[name] for name in ATTACKS]
    body = [
        [*row[:2], *("-" if share is None else f"{100 * share:.0f}" for share in row[2:])]
        for row in dict.fromkeys(rows)
    ]
    return f"{provenance(lines)}\n\n{trials.table(head, body)}" if rows else "Nothing measured yet."


def _parts(survey: dict, gone: np.ndarray, near: np.ndarray) -> tuple[float | None, ...]:
    """Shares of a survey's images: right about things that are gone, near, neither; about the hands of what is kept."""
    labels, answers = np.asarray(survey["labels"]), np.asarray(survey["judge"])
    right, thing = labels == answers, labels[:, THING]
    of = ((right[:, THING], gone), (right[:, THING], near), (right[:, THING], ~gone & ~near), (right[:, STYLE], ~gone))
    return tuple(float(hits[mine[thing]].mean()) if mine[thing].any() else None for hits, mine in of)


def _attacks(each) -> tuple[float | None, ...]:
    """Means over concepts of `ATTACKS`; None without any."""
    return tuple(statistics.fmean(of[name] for of in each) if each else None for name in ATTACKS)


def by_thing(survey: dict) -> np.ndarray:
    """(things,) share of a survey's images that show the thing they are asked for."""
    labels, answers = np.asarray(survey["labels"]), np.asarray(survey["judge"])
    right, count = labels[:, THING] == answers[:, THING], np.bincount(labels[:, THING])
    return np.bincount(labels[:, THING], right, len(count)) / count


def text_similarity(names: list[str]) -> np.ndarray:
    """(n, n) cosines of words by the canvas's text encoder, at the end-of-text token, less the mean of all."""
    import aegis_jax
    from aegis_jax.diffusion.conditioning import encode

    pipeline = aegis_jax.load_pipeline("canvas")
    ids, states = np.asarray(pipeline.tokenizer.ids(names)), np.asarray(encode(pipeline, names).embedding)
    rows = states[np.arange(len(names)), (ids == pipeline.tokenizer.eos_token_id).argmax(1)]
    rows = rows - rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T
