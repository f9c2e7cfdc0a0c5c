"""Cells pooled over seeds: what report.json holds, and the table that is printed.

A share is {"count", "n", "share", "interval", "by_seed"}: Wilson's 95 % interval of all images or prompts of all seeds.
It knows of no scatter between seeds beyond that of images, so each seed's own share stands beside it.
"""

import dataclasses
import json
import shlex

from aegis_jax.attacks import find
from aegis_jax.evaluation.interval import wilson
from aegis_jax.report.chosen import SOFT_PROMPT
from aegis_jax.report.plan import PLAIN, Plan, Row, judge_digest, versions
from aegis_jax.run import manifest
from aegis_jax.run.folder import RunFolder

SHOWN = {"plain": "plain prompts", "held_out": "held-out synonyms"}  # less is better
UNASKED = {"open": "left open", "empty": "empty prompt"}
KEPT = {"same": "kept: same attribute", "other": "kept: others"}  # more is better


def report(what: Plan, lines: list[dict], about: dict) -> dict:
    """Plain values. lines: of all cells, each with its row's name; about: "command" and "show"."""
    rows = [_row(what, row, [line for line in lines if line["row"] == row.name]) for row in what.rows]
    return {
        "concept": what.text, "attribute": what.concept.attribute, "value": what.concept.value.name,
        "base": what.base, "folder": str(what.out), "made": manifest.now(), **about,
        "versions": versions(), "judge": {"name": "world", "sha256": judge_digest()},
        "seeds": list(what.seeds), "images": what.images, "cases": what.cases, "neutral": what.neutral,
        "attacks": {name: _about(name, config) for name, config in what.attacks.items()},
        "rows": rows, "seconds": sum(row["seconds"] for row in rows),
        "unet_evaluations": sum(row["unet_evaluations"] for row in rows),
    }  # fmt: skip


def _about(name: str, config) -> dict:
    return {"of": find(name).of, "settings": json.loads(json.dumps(dataclasses.asdict(config)))}


def _row(what: Plan, row: Row, lines: list[dict]) -> dict:
    plain = [line for line in lines if line["cell"]["kind"] == PLAIN]
    names = (*SHOWN, *KEPT, *UNASKED)
    attacks = {name: _attack(what, row, name, lines) for name in what.attacks}
    return {
        "name": row.name, "role": row.role, "model": row.model, "sha256": lines[0]["cell"]["model"],
        **_training(what, row),
        "figures": {name: pooled(plain, name) for name in names}, "plain_cost": _cost(plain),
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
    if name == SOFT_PROMPT:
        members = {member: pooled(lines, "members", member) for member in lines[0]["figures"]["members"]}
        best = max(members, key=lambda member: members[member]["share"])
        return {"rate": members[best], "member": best, "members": members}
    kept = {figure: pooled(lines, figure) for figure in lines[0]["figures"]}
    shown = {"concept": "shown", "picture": "attack_succeeded"}.get(find(name).of, "together")
    return kept | {"rate": kept[shown]}


def pooled(lines: list[dict], *path: str) -> dict:
    """The share at `path` of the cells' figures, over all seeds; without share and interval where n is 0."""
    by_seed = {}
    for line in lines:
        found = line["figures"]
        for name in path:
            found = found[name]
        by_seed[str(line["cell"]["seed"])] = found
    count, n = (sum(found[name] for found in by_seed.values()) for name in ("count", "n"))
    share = {"share": count / n, "interval": list(wilson(count, n))} if n else {"share": None, "interval": None}
    return {"count": count, "n": n, **share, "by_seed": by_seed}


def _worst(attacks: dict, of: str | None = None) -> dict | None:
    """The attack that brings back most, of all or of those by prompt."""
    chosen = [name for name in attacks if of in (None, find(name).of) and attacks[name]["rate"]["n"]]
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
        command = ["aegis", "erase", "--model", what.base, "--concept", what.text, "--config", what.config, *given]
    return {"method": settings.erase.method, "erase_seconds": seconds, "erase_command": shlex.join(command or [])}


def _command(what: Plan, row: Row, attack: str) -> str:
    """The command that makes a row's figures of an attack again; the base's are among them."""
    parts = ["aegis", "evaluate"]
    if row.role == "model":
        parts.append(str(row.run or row.model))
    parts += ["--base", what.base, "--concept", what.text, "--attacks", attack]
    if row.role == "baseline":
        parts += ["--baselines", row.config.erase.method, "--config", what.config]
        parts += [f"--config.{key}={value}" for key, value in what.overrides]
    parts += [f"--attack.{attack}.{key}={value}" for key, value in what.settings.get(attack, {}).items()]
    parts += ["--seeds", ",".join(map(str, what.seeds)), "--images", str(what.images), "--cases", str(what.cases)]
    parts += ["--neutral", "none" if what.neutral is None else what.neutral, "--out", "again"]
    return shlex.join(parts)


def percent(share: dict | None) -> str:
    return "-" if share is None or share["share"] is None else f"{share['share']:.0%}"


def spread(share: dict) -> str:
    low, high = share["interval"]
    return f"{low:.0%} to {high:.0%}"


def text(found: dict) -> str:
    """The table for a terminal: a line a model."""
    head = ["model", *SHOWN.values(), *found["attacks"], *KEPT.values()]
    table = [head]
    for row in found["rows"]:
        shares = [row["figures"][name] for name in SHOWN]
        shares += [attack["rate"] for attack in row["attacks"].values()]
        shares += [row["figures"][name] for name in KEPT]
        table.append([row["name"], *map(percent, shares)])
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table)
