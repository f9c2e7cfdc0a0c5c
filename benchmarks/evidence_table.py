"""The tables of `python -m benchmarks evidence`, of its lines."""

import pathlib
import re

from benchmarks import trials

SHARES = ("plain", "held_out", "same", "other", "together", "near")
VALUES = ("frechet_judge_base", "frechet_judge_real", "clip_score")


def pooled(lines: list[dict]) -> dict:
    """Of the lines of one concept and method: shares and attacks as (count, n) over seeds, values as means."""
    figures = [line["figures"] for line in lines]
    total = lambda each: (sum(x["count"] for x in each), sum(x["n"] for x in each))  # noqa: E731
    return {
        "shares": {name: total([each["shares"][name] for each in figures]) for name in SHARES},
        "values": {name: sum(each["values"][name] for each in figures) / len(figures) for name in VALUES},
        "attacks": {name: _of_seeds([each["attacks"][name] for each in figures]) for name in figures[0]["attacks"]},
    }


def _of_seeds(each: list[dict]) -> tuple[int, int]:
    if "members" not in each[0]:
        return sum(x["count"] for x in each), sum(x["n"] for x in each)
    members = [[sum(x["members"][name][k] for x in each) for k in (0, 1)] for name in each[0]["members"]]
    return tuple(max(members, key=lambda pair: pair[0] / pair[1]))


def rate(pair: tuple[int, int]) -> str:
    """ "12 % (8 to 17)": the share and Wilson's 95 % interval."""
    from aegis_jax.evaluation.interval import wilson

    if not pair[1]:
        return "-"
    low, high = wilson(*pair)
    return f"{100 * pair[0] / pair[1]:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


HEAD = {
    "plain": "plain prompts", "held_out": "held-out synonyms", "worst_prompt": "worst attack by prompt",
    "worst_token": "worst attack by embedding", "same": "kept: same attribute", "other": "kept: others",
    "near": "near words", "together": "three attributes at once", "frechet_judge_base": "Frechet to the base",
    "clip_score": "CLIP score",
}  # fmt: skip


def tables(lines: dict[tuple, list[dict]], concepts, methods) -> str:
    """Markdown: of each concept the summary, a row a method, and each attack by itself. lines: by (concept, method)."""
    parts = []
    for concept in concepts:
        rows, found = [], {m: pooled(lines[concept, m]) for m in methods if lines.get((concept, m))}
        if not found:
            parts.append(f"**{concept}**: not run.")
            continue
        for method in methods:
            row = _summary(found[method]) if method in found else ["not run"] + ["-"] * (len(HEAD) - 1)
            rows.append([f"`{method}`", str(len(lines.get((concept, method), ()))), *row])
        parts += [f"**{concept}**", trials.table(["method", "seeds", *HEAD.values()], rows)]
        attacks = list(dict.fromkeys(name for figures in found.values() for name in figures["attacks"]))
        if attacks:
            each = [[f"`{m}`", *(rate(found[m]["attacks"][name]) for name in attacks)] for m in methods if m in found]
            parts.append(trials.table(["method", *attacks], each))
    return "\n\n".join(parts)


def _summary(figures: dict) -> list[str]:
    from aegis_jax.attacks import find

    def worst(of) -> str:
        those = {name: pair for name, pair in figures["attacks"].items() if of(name) and pair[1]}
        if not those:
            return "-"
        name = max(those, key=lambda name: those[name][0] / those[name][1])
        return f"{rate(those[name])}, {name}"

    shown = {name: rate(pair) for name, pair in figures["shares"].items()}
    shown |= {name: f"{value:.3g}" for name, value in figures["values"].items()}
    shown |= {
        "worst_prompt": worst(lambda name: find(name).in_words),
        "worst_token": worst(lambda name: find(name).of == "concept" and not find(name).in_words),
    }
    return [shown[name] for name in HEAD]


def provenance(lines: list[dict], command: str) -> str:
    """What the table was made by: command, machines, versions, dates, time."""
    if not lines:
        return f"Not run yet. Command: `{command}`."
    # Lines of 2026-11-29 and before have a cell's own time alone.
    seconds = sum(line["figures"].get("seconds", line["seconds"]) for line in lines)
    about, hours = [line["about"] for line in lines], seconds / 3600
    each = lambda values: ", ".join(dict.fromkeys(map(str, values)))  # noqa: E731
    dates, machines = sorted(found["date"] for found in about), [f"{a['cores']} cores of {a['cpu']}" for a in about]
    return (
        f"Command: `{command}`. {len(lines)} lines (a concept, a seed, a method) in {hours:.1f} h, "
        f"{dates[0]} to {dates[-1]}, on {each(machines)}; jax {each(a['versions']['jax'] for a in about)}, revision "
        f"{each(a['revision'] for a in about)}. Shares have Wilson's 95 % interval, pooled over seeds; it knows "
        "nothing of the scatter between seeds."
    )


def text(lines: list[dict], command: str, concepts, methods) -> str:
    """Provenance and tables of these lines."""
    by: dict[tuple, list[dict]] = {}
    for line in lines:
        by.setdefault((line["cell"]["concept"], line["cell"]["method"]), []).append(line)
    return provenance(lines, command) + "\n\n" + tables(by, concepts, methods)


def into_page(page: pathlib.Path, text: str, name: str = "evidence") -> None:
    """Puts a text between the page's markers of that name. Raises SystemExit where it has none."""
    whole, (start, end) = page.read_text("utf-8"), (f"<!-- {name} -->", f"<!-- end {name} -->")
    found, count = re.subn(f"{start}.*{end}", lambda _: f"{start}\n{text}\n{end}", whole, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page} has no {start} ... {end}")
    page.write_text(found, "utf-8")
