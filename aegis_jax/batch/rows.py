"""From a plan file to a `Plan`; everything that is wrong with it is told at once, line by line, before anything runs.

A .csv has a column `name`, may have `words` (related words that are erased with it, parted by ";"), and any other
column is a config key of the method, an empty cell leaving it as it is:

    name,words,steps
    Van Gogh,starry night;Vincent van Gogh,
    Monet,,800

A .jsonl has an object a line: {"name": "Van Gogh", "words": ["starry night"], "steps": 800, "grp": {"mu": 0.2}}.
"""

import dataclasses
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

from aegis_jax.erasure.presets import PRESETS
from aegis_jax.errors import AegisError
from aegis_jax.run import config as run_config
from aegis_jax.run import table
from aegis_jax.run.asked import on_this_device
from aegis_jax.run.config import RunConfig

_OWN = ("name", "words")
_NOT_THE_METHODS = {field.name for field in dataclasses.fields(RunConfig)} - {"erase"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row as it stands in the file: its line, concepts, and overrides: texts of a .csv, values of a .jsonl."""

    line: int
    concepts: tuple[str, ...]
    texts: tuple[tuple[str, str], ...] = ()
    values: tuple[tuple[str, object], ...] = ()


@dataclasses.dataclass(frozen=True)
class File:
    """A plan file as read: its rows, the columns of a .csv that are config keys, and [(line, what is wrong), ...]."""

    path: Path
    rows: list[Asked]
    columns: list[str]
    problems: list[tuple[int, str]]


def read(path: Path) -> File:
    """A plan file. Raises `AegisError` if it has no row that can be read; `check` tells what is wrong with others."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise AegisError(f"{path} does not exist: give a plan, a .csv or .jsonl with a row for each erasure") from None
    except UnicodeDecodeError as error:
        raise AegisError(f"{path} is not UTF-8 ({error}): save it as that") from None
    kinds = {".csv": _of_csv, ".jsonl": _of_jsonl}
    if path.suffix.lower() not in kinds:
        raise AegisError(f"{path} is no plan: give a .csv or a .jsonl")
    found = File(path, *kinds[path.suffix.lower()](text))
    if not found.rows:
        table.refuse(path, found.problems)
        raise AegisError(f"{path} has no rows: give one for each erasure")
    return found


def together(path: Path) -> list[str]:
    """The concepts of all rows, in their order and each once, for one model without any of them.

    Raises `AegisError` naming every line that could not be read, and those with settings: one run has but one.
    """
    file = read(path)
    problems = file.problems + [
        (row.line, f"sets {(*row.texts, *row.values)[0][0]}, but one run has the same settings for all its concepts")
        for row in file.rows
        if row.texts or row.values
    ]
    table.refuse(path, problems)
    return list(dict.fromkeys(concept for row in file.rows for concept in row.concepts))


def check(file: File, run: RunConfig, fits: Callable) -> list[tuple]:
    """(concepts, {config key: value}, run) of each row, as `plan.make` takes them.

    run: the settings that rows change. fits: (run, concepts) -> None, raises `AegisError` for concepts that the model
    cannot take. Raises `AegisError` naming every line that could not be read, with an unknown key, a value out of
    range, a concept that does not fit or a row that was there before.
    """
    unknown = _unknown(run, file.columns)
    problems = file.problems + [(1, what) for what in unknown.values()]
    found, settled, first = [], {}, {}
    for row in file.rows:
        row = dataclasses.replace(row, texts=tuple((key, text) for key, text in row.texts if key not in unknown))
        overrides = row.texts, row.values
        try:
            if repr(overrides) not in settled:
                settled[repr(overrides)] = _settings(run, row)
            values, own = settled[repr(overrides)]
            fits(own, row.concepts)
        except AegisError as error:
            problems.append((row.line, str(error)))
            continue
        same = first.setdefault((row.concepts, json.dumps(values)), row.line)
        if same != row.line:
            problems.append((row.line, f"{row.concepts[0]!r} with the same settings is on line {same} already"))
        found.append((row.concepts, values, own))
    table.refuse(file.path, problems)
    return found


def _unknown(run: RunConfig, columns: list[str]) -> dict[str, str]:
    """{column: what is wrong with it} of those that are a key of no method, whatever stands in them."""
    methods = [run.erase, *(preset.settings for preset in PRESETS.values())]
    known = {key for settings in methods for key in run_config.keys(dataclasses.replace(run, erase=settings))}
    wrong = {}
    for column in columns:
        try:
            check_keys([column])
            if column not in known:
                run_config.merge(run, {}, [(column, "")])
        except AegisError as error:
            wrong[column] = str(error)
    return wrong


def check_keys(keys) -> None:
    """Raises `AegisError` for a config key that says nothing of a single erasure."""
    for key in keys:
        if key.partition(".")[0] in _NOT_THE_METHODS:
            raise AegisError(f"config key {key!r} is not the method's: a batch has no checkpoints, pictures or meshes")


def _settings(run: RunConfig, row: Asked) -> tuple[dict, RunConfig]:
    check_keys(key for key, _ in (*row.texts, *row.values))
    # The row's method may have a device-dependent setting that the run's has not.
    own = on_this_device(run_config.merge(run, dict(row.values), row.texts))
    values = {k: v for k, v in run_config.values(own).items() if k.partition(".")[0] not in _NOT_THE_METHODS}
    return values, own


def _of_csv(text: str) -> tuple[list[Asked], list, list]:
    names, found, problems = table.read(text)
    if not names and problems:
        return [], [], problems
    if "name" not in names:
        return [], [], [(1, f"no column name (its columns: {', '.join(names) or 'none'})")]
    if "" in names:
        return [], [], [(1, "a column without a name")]
    rows = []
    for line, row in found:
        cells = {name: (cell or "").strip() for name, cell in row.items()}
        words = [word.strip() for word in cells.get("words", "").split(";") if word.strip()]
        wrong = _wrong_texts([cells["name"], *words])
        if wrong:
            problems.append((line, wrong))
            continue
        texts = tuple((name, cell) for name, cell in cells.items() if name not in _OWN and cell)
        rows.append(Asked(line, (cells["name"], *words), texts))
    return rows, [name for name in names if name not in _OWN], problems


def _of_jsonl(text: str) -> tuple[list[Asked], list, list]:
    rows, problems = [], []
    for line, said in enumerate(text.split("\n"), 1):
        if not said.strip():
            continue
        try:
            row = json.loads(said, object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:
            problems.append((line, f"no JSON ({error})"))
            continue
        name, words = (row.pop("name", None), row.pop("words", [])) if isinstance(row, dict) else (None, [])
        if not isinstance(name, str):
            problems.append((line, 'no name: wanted an object like {"name": "Van Gogh"}'))
        elif not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            problems.append((line, f"words is {words!r:.80}, wanted a list of texts"))
        else:
            concepts = (name.strip(), *(word.strip() for word in words))
            if wrong := _wrong_texts(concepts):
                problems.append((line, wrong))
            else:
                rows.append(Asked(line, concepts, values=tuple(run_config.flat(row).items())))
    return rows, [], problems


def _wrong_texts(concepts) -> str | None:
    """What is wrong with a row's concepts, or None."""
    if not concepts[0]:
        return "the name is empty"
    for concept in concepts:
        # A line's end in a cell is most often a quote that was never closed, and the rows behind it.
        if any(unicodedata.category(letter) == "Cc" for letter in concept):
            return f"{concept!r:.80} has a line's end or another control character in it"
    twice = next((concept for concept in concepts if concepts.count(concept) > 1), None)
    return None if twice is None else f"{twice!r} is there twice"


def _each_once(pairs: list[tuple]) -> dict:
    """A JSON object, or ValueError for a key that it has twice, {"grp": {"mu": 1}, "grp.mu": 2} among them."""
    found = dict(pairs)
    names = [name for name, value in pairs for name in run_config.flat({name: value})]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice")
    return found
