"""Cells pooled over seeds: what report.json holds, and the table that is printed.

What a share, a mean and a distance are says pooled.py. Intervals know of no scatter between seeds beyond that of
images, so each seed's own figure stands beside the pooled one.
"""

import dataclasses
import json
import shlex

from aegis_jax.attacks import find
from aegis_jax.evaluation.metrics.neighbours import TOGETHER
from aegis_jax.report.chosen import SOFT_PROMPT
from aegis_jax.report.plan import Plan, versions
from aegis_jax.report.pooled import pooled, shown
from aegis_jax.report.rows import Row
from aegis_jax.report.subject import DIAGNOSTICS, PLAIN, RETENTION
from aegis_jax.run import manifest
from aegis_jax.run.folder import RunFolder


def report(what: Plan, lines: list[dict], about: dict) -> dict:
    """Plain values. lines: of all cells, each with its row's name; about: "command" and "show"."""
    rows = [_row(what, row, [line for line in lines if line["row"] == row.name]) for row in what.rows]
    return {
        "concept": what.text, "base": what.base, "folder": str(what.out), "made": manifest.now(), **about,
        "versions": versions(), **json.loads(json.dumps(what.subject.about())), "kept": list(what.subject.kept),
        "columns": [dataclasses.asdict(column) for column in what.subject.columns],
        "seeds": list(what.seeds), "images": what.images, "cases": what.cases, "neutral": what.neutral,
        "attacks": {name: _about(name, config) for name, config in what.attacks.items()}, "left_out": what.left_out,
        "rows": rows, "seconds": sum(row["seconds"] for row in rows),
        "unet_evaluations": sum(row["unet_evaluations"] for row in rows),
    }  # fmt: skip


def _about(name: str, config) -> dict:
    return {"of": find(name).of, "settings": json.loads(json.dumps(dataclasses.asdict(config)))}


def _row(what: Plan, row: Row, lines: list[dict]) -> dict:
    of_kind: dict[str, list[dict]] = {}
    for line in lines:
        of_kind.setdefault(line["cell"]["kind"], []).append(line)
    figures = {c.name: pooled(of_kind[c.kind], *(c.path or (c.name,))) for c in what.subject.columns}
    near = [line["figures"].get("near", {}) for line in of_kind.get(RETENTION, [])[:1]]
    words = [word for found in near for word in found if word != TOGETHER]
    attacks = {name: _attack(what, row, name, lines) for name in what.attacks}
    plain, diagnostics = of_kind[PLAIN], of_kind[DIAGNOSTICS]
    return {
        "name": row.name, "role": row.role, "model": row.model, "sha256": lines[0]["cell"]["model"],
        **_training(what, row), "figures": figures,
        "near": {word: pooled(of_kind[RETENTION], "near", word) for word in words},
        "diagnostics": {
            word: {d: pooled(diagnostics, "words", word, d) for d in ("d0", "d1")}
            for word in diagnostics[0]["figures"]["words"]
        },
        "plain_cost": _cost(plain + of_kind.get(RETENTION, []) + diagnostics),
        "command": _command(what, row, "none"), "pictures": _pictures(plain),
        "attacks": attacks, "worst": _worst(attacks, "prompt"), "worst_of_all": _worst(attacks),
        **_cost(lines),
    }  # fmt: skip


def _attack(what: Plan, row: Row, name: str, lines: list[dict]) -> dict:
    mine = [line for line in lines if line["cell"]["kind"] == name and line["cell"]["neutral"] is None]
    control = [line for line in lines if line["cell"]["kind"] == name and line["cell"]["neutral"] is not None]
    found = {"command": _command(what, row, name), "pictures": _pictures(mine), **_cost(mine), **_success(name, mine)}
    if control:
        found["control"] = {"word": what.neutral, "pictures": _pictures(control), **_cost(control)}
        found["control"] |= _success(name, control)
    return found


def _success(name: str, lines: list[dict]) -> dict:
    """Counts of an attack; "rate" is the one that tables show."""
    found = {}
    if "d2" in lines[0]["figures"]:
        measured = [line for line in lines if line["figures"]["d2"] is not None]
        found = {"d2": pooled(measured, "d2") if measured else None}
    if name == SOFT_PROMPT:
        members = {member: pooled(lines, "members", member) for member in lines[0]["figures"]["members"]}
        best = max(members, key=lambda member: members[member]["share"])
        return found | {"rate": members[best], "member": best, "members": members}
    kept = {figure: pooled(lines, figure) for figure in lines[0]["figures"] if figure != "d2"}
    rate = {"concept": "shown", "picture": "attack_succeeded"}.get(find(name).of, "together")
    return found | kept | {"rate": kept[rate]}


def _worst(attacks: dict, of: str | None = None) -> dict | None:
    """The attack that brings back most, of all or of those by prompt.

    Those that are given a picture are left out: without their controls their rates say nothing.
    """
    fits = lambda kind: kind != "guided" if of is None else kind == of  # noqa: E731
    chosen = [name for name in attacks if fits(find(name).of) and attacks[name]["rate"]["n"]]
    if not chosen:
        return None
    name = max(chosen, key=lambda name: attacks[name]["rate"]["share"])
    return {"attack": name, "rate": attacks[name]["rate"]}


def _cost(lines: list[dict]) -> dict:
    seconds, cost = (sum(line[name] for line in lines) for name in ("seconds", "unet_evaluations"))
    return {"seconds": round(seconds, 1), "unet_evaluations": cost}


def _pictures(lines: list[dict]) -> dict:
    """Of the first seed: the file under cells/ and what each picture's prompt was."""
    return {"seed": lines[0]["cell"]["seed"], "file": lines[0]["file"] + ".png", "prompts": lines[0]["prompts"]}


def _training(what: Plan, row: Row) -> dict:
    """What is known of how the row's model was made."""
    if row.run is None:
        return {"method": None, "erase_seconds": None, "erase_command": None}
    folder = RunFolder(row.run)
    settings = folder.reopen()
    steps = folder.read_metrics()
    seconds = round(sum(1 / step["steps_per_s"] for step in steps if step.get("steps_per_s")), 1)
    command = folder.read_manifest().get("command")
    if row.role == "baseline":
        more = [("method", settings.erase.method), *what.overrides]
        given = [f"--config.{key}={value}" for key, value in more]
        command = ["aegis", "erase", "--model", what.base, "--concept", what.text, *_config(what), *given]
    return {"method": settings.erase.method, "erase_seconds": seconds, "erase_command": shlex.join(command or [])}


def _command(what: Plan, row: Row, attack: str) -> str:
    """The command that makes a row's figures of an attack again; the base's are among them."""
    parts = ["aegis", "evaluate"]
    if row.role == "model":
        parts.append(str(row.run or row.model))
    parts += ["--base", what.base, "--concept", what.text, "--attacks", attack]
    if row.role == "baseline":
        parts += ["--baselines", row.config.erase.method, *_config(what)]
        parts += [f"--config.{key}={value}" for key, value in what.overrides]
    parts += [part for flag, value in what.options for part in ("--" + flag.replace("_", "-"), value)]
    parts += [f"--attack.{attack}.{key}={value}" for key, value in what.settings.get(attack, {}).items()]
    parts += ["--seeds", ",".join(map(str, what.seeds)), "--images", str(what.images), "--cases", str(what.cases)]
    parts += ["--neutral", "none" if what.neutral is None else what.neutral, "--out", "again"]
    return shlex.join(parts)


def _config(what: Plan) -> list[str]:
    return [] if what.config is None else ["--config", what.config]


def text(found: dict) -> str:
    """The table for a terminal: a line a model."""
    columns = [column for column in found["columns"] if column["place"] == "summary" and column["sense"] != "none"]
    first, last = ([c for c in columns if c["sense"] == sense] for sense in ("less", "more"))
    table = [["model", *(c["title"] for c in first), *found["attacks"], *(c["title"] for c in last)]]
    for row in found["rows"]:
        figures = [row["figures"][c["name"]] for c in first]
        figures += [attack["rate"] for attack in row["attacks"].values()]
        figures += [row["figures"][c["name"]] for c in last]
        table.append([row["name"], *(shown(figure)[0] for figure in figures)])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)
