"""What a batch is to do, as it lies beside its results (plan.jsonl), and which lane each of its rows has.

The first line tells the base model and the settings, each of the others is one erasure. It never changes: what a row
comes to depends on nothing but the base, its concepts and its settings, of which its id is the hash.
"""

import dataclasses
import hashlib
import json
from typing import Any

from aegis_jax.errors import AegisError
from aegis_jax.run.slug import slug

VERSION = 1
_KEPT = "what was begun keeps its plan; other or more concepts are another plan file with another --out"


@dataclasses.dataclass(frozen=True)
class Row:
    """One erasure.

    Attributes:
      id: 12 hex digits, hash of the base model, the concepts and the settings.
      concepts: the name, and the related words that are erased with it.
      settings: which of the plan's settings it has.
      number: which it is of the rows with the same `program`; its lane is this number modulo the lanes.
      run: what `settings` are as a `RunConfig`; None for a plan that was read back.
    """

    id: str
    concepts: tuple[str, ...]
    settings: int
    number: int
    run: Any = None

    @property
    def name(self) -> str:
        return self.concepts[0]

    @property
    def file(self) -> str:
        """Of its results, without an ending."""
        return f"{slug(self.name) or 'concept'}-{self.id}"

    @property
    def program(self) -> tuple[int, int]:
        """Equal for rows whose erasures share their compiled programs."""
        return self.settings, len(self.concepts)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All erasures of a batch.

    Attributes:
      model: the base, as records name it. base: its hash. settings: {dotted key: value} of every kind of row there is.
    """

    model: str
    base: str
    settings: list[dict]
    rows: list[Row]

    def text(self) -> str:
        """As it is kept."""
        first = {"aegis_batch": VERSION, "model": self.model, "base": self.base, "settings": self.settings}
        lines = [{"id": row.id, "concepts": row.concepts, "settings": row.settings} for row in self.rows]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [first, *lines])

    def from_offset(self, worker: str) -> list[Row]:
        """The rows in the order in which a worker looks at them: it begins somewhere of its own."""
        first = int(hashlib.sha256(worker.encode()).hexdigest(), 16) % len(self.rows)
        return self.rows[first:] + self.rows[:first]


def make(model: str, base: str, asked: list[tuple[tuple[str, ...], dict, Any]]) -> Plan:
    """The plan of erasures, each (concepts, {dotted key: value}, run)."""
    rows, counts, kinds = [], {}, {}
    for concepts, values, run in asked:
        kind = kinds.setdefault(json.dumps(values, sort_keys=True), len(kinds))
        program = kind, len(concepts)
        counts[program] = counts.get(program, -1) + 1
        rows.append(Row(row_id(base, concepts, values), tuple(concepts), kind, counts[program], run))
    return Plan(model, base, [json.loads(values) for values in kinds], rows)


def row_id(base: str, concepts, values: dict) -> str:
    said = json.dumps([base, list(concepts), values], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def parse(text: str, where: str) -> Plan:
    """The plan that `Plan.text` wrote. Raises `AegisError` for anything else."""
    try:
        first, *lines = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
        version = first["aegis_batch"]
        asked = [(line["concepts"], first["settings"][line["settings"]], None) for line in lines]
        plan = make(first["model"], first["base"], asked)
    except (ValueError, KeyError, TypeError, IndexError):
        plan = None
    if plan is None or (version == VERSION and plan.text() != text):
        raise AegisError(f"{where} is no plan that aegis batch wrote, or was changed since: restore it")
    if version != VERSION:
        raise AegisError(f"{where} is a plan of version {version!r}, known is {VERSION}: install a newer aegis_jax")
    return plan


def refuse_other(kept: Plan, ours: Plan, where: str) -> None:
    """Raises the `AegisError` that says in what a plan differs from the one that was begun."""
    if kept.base != ours.base:
        what = f"was begun with another base model ({kept.model})"
    elif kept.model != ours.model:  # results name it
        what = f"was begun with the same base under another name ({kept.model}, here {ours.model})"
    elif kept.settings != ours.settings:
        what = "was begun with other settings" + _difference(kept.settings, ours.settings)
    else:
        have = {row.id for row in kept.rows}
        new = [row.name for row in ours.rows if row.id not in have]
        named = f" ({', '.join(map(repr, new[:3]))}{' and more' * (len(new) > 3)} not among them)" if new else ""
        what = f"was begun with another plan, of {len(kept.rows)} rows{named}"
    raise AegisError(f"{where} {what}: {_KEPT}")


def _difference(kept: list[dict], ours: list[dict]) -> str:
    for before, now in zip(kept, ours):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return f" ({key} was {before.get(key)!r}, is {now.get(key)!r})"
    return ""
