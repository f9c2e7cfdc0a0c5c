"""Prompts from a file, as evaluations have them, and the index that says which image came from which."""

import csv
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

from aegis_jax.errors import AegisError
from aegis_jax.run.folder import write_text

SEEDS = ("evaluation_seed", "sd_seed", "seed")  # columns that the field's files have; the first there counts
GUIDANCES = ("evaluation_guidance", "sd_guidance_scale")
INDEX = "prompts.csv"
# All that an image depends on; height and width in pixels.
COLUMNS = (
    "file", "prompt", "seed", "guidance", "steps", "negative_prompt", "height", "width", "model", "revision", "variant",
)  # fmt: skip
# Columns of prompt files that speak of what is one for all images of a call.
_SETTINGS = {name: name for name in COLUMNS[3:]} | dict.fromkeys(GUIDANCES, "guidance")


@dataclasses.dataclass(frozen=True)
class Prompt:
    text: str
    seed: int | None = None  # of its noise; None: whatever holds for all


def read(path: Path) -> tuple[list[Prompt], dict[str, set[str]]]:
    """The prompts of a file, and what its columns say of other settings that an image depends on: {setting: texts}.

    A .csv has a column prompt and may have one of `SEEDS`; any other file is text with one prompt a line, empty lines
    left out.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AegisError(f"{path} is not UTF-8 ({error}): save it as that") from None
    said: dict[str, set[str]] = {}
    if path.suffix.lower() == ".csv":
        prompts = _rows(path, text, said)
    else:
        prompts = [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise AegisError(f"{path} has no prompts")
    return prompts, said


def unused(path: Path, said: dict[str, set[str]], settings: Mapping) -> list[str]:
    """Notes on what `read` found said of settings, where it is not what all prompts are sampled with."""
    return [
        f"{path}: its own {name} is not used, {name} is {settings[name]!r} for all prompts"
        for name, texts in said.items()
        if not all(_says(text, settings[name]) for text in texts)
    ]


def _says(text: str, value) -> bool:
    try:
        return float(text) == float(value)
    except ValueError:
        return text == str(value)


def _rows(path: Path, text: str, said: dict[str, set[str]]) -> list[Prompt]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    prompts = []
    try:
        names = {name.strip().lower(): name for name in reader.fieldnames or ()}
        if "prompt" not in names:
            raise AegisError(f"{path} has no column prompt (its columns: {', '.join(names) or 'none'})")
        seed_column = next((names[name] for name in SEEDS if name in names), None)
        columns = [(_SETTINGS[name], column) for name, column in names.items() if name in _SETTINGS]
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if row[names["prompt"]] is None:
                raise AegisError(f"{where}: no prompt")
            seed = None if seed_column is None else _seed(row[seed_column], seed_column, where)
            prompts.append(Prompt(row[names["prompt"]], seed))
            for name, column in columns:
                said.setdefault(name, set()).add(row[column] or "")
    except csv.Error as error:
        raise AegisError(f"{path}, after line {reader.line_num}: {error}") from error
    return prompts


def _seed(text: str | None, column: str, where: str) -> int:
    text = text or ""
    if text.strip().isdecimal():
        return int(text)
    try:
        number = float(text)  # pandas writes 7 as 7.0 where other rows have none
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise AegisError(f"{where}: {column} = {text!r}, wanted a whole number")
    return int(number)


def check_index(folder: Path) -> dict[str, dict]:
    """{file: row} of an index that lies in the folder already. Raises `AegisError` for a file that is none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            if tuple(reader.fieldnames or ()) == COLUMNS:
                return {row["file"]: row for row in reader}
        except (csv.Error, UnicodeDecodeError):
            pass
    raise AegisError(f"{path} is no index of this version's aegis sample: choose another --out")


def write_index(folder: Path, rows: dict[str, dict]) -> None:
    """Writes {file: row} as prompts.csv, which `read` takes as well."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[file] for file in sorted(rows))
    write_text(folder / INDEX, text.getvalue())
