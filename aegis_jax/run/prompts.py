"""Prompts from a file, as evaluations have them, and the index that says which image came from which."""

import csv
import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from aegis_jax.errors import AegisError
from aegis_jax.run import table
from aegis_jax.run.folder import write_text

SEEDS = ("evaluation_seed", "sd_seed", "seed")  # columns that the field's files have; the first there counts
GUIDANCES = ("evaluation_guidance", "sd_guidance_scale", "guidance")  # likewise
CASES = ("case_number", "unnamed: 0")  # likewise; pandas calls a nameless index so
INDEX = "prompts.csv"
# All that an image depends on; height and width in pixels.
COLUMNS = (
    "file", "prompt", "seed", "guidance", "steps", "negative_prompt", "height", "width", "model", "revision", "variant",
)  # fmt: skip
# Columns of prompt files that speak of what is one for all images of a call.
_SETTINGS = {name: name for name in COLUMNS[3:]} | dict.fromkeys(GUIDANCES, "guidance")
_MAY_BE_EMPTY = ("negative_prompt", "revision", "variant")  # a blank cell of others says nothing


@dataclasses.dataclass(frozen=True)
class Prompt:
    """seed: of its noise; None: whatever holds for all. guidance: its own, or None likewise. case: how the file numbers
    it, "" where it does not."""

    text: str
    seed: int | None = None
    guidance: float | None = None
    case: str = ""


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """A file of prompts.

    Attributes:
      said: what its columns say of settings that an image depends on, {setting: texts}.
      sha256: of the file's bytes.
    """

    path: Path
    prompts: list[Prompt]
    said: dict[str, set[str]]
    sha256: str

    def by_guidance(self, usual: float) -> dict[float, list[int]]:
        """{guidance: numbers of the prompts that are sampled with it}, `usual` where a prompt brings none."""
        numbers: dict[float, list[int]] = {}
        for k, prompt in enumerate(self.prompts):
            numbers.setdefault(usual if prompt.guidance is None else prompt.guidance, []).append(k)
        return numbers

    def record(self) -> dict:
        """What a report says of it, as plain values; "known" names the field's own file, if it is one to the byte."""
        return {
            "file": str(self.path),
            "sha256": self.sha256,
            "read_as": "table" if is_table(self.path) else "lines",  # the same bytes are other prompts
            "known": KNOWN.get(self.sha256, ""),
            "prompts": len(self.prompts),
            "with_seed": sum(prompt.seed is not None for prompt in self.prompts),
            "guidances": sorted({prompt.guidance for prompt in self.prompts if prompt.guidance is not None}),
        }


# The files of prompts/ in OPTML-Group/Diffusion-MU-Attack, commit 5a3e5d3, which AdvUnlearn, STEREO and AEGIS are
# evaluated with. They are the user's to bring: none is shipped.
KNOWN = {
    digest: f"{name} of Diffusion-MU-Attack"
    for name, digest in {
        "nudity.csv": "0a40f6e63bca976513d1d56df71480239ba1eb5c7a9de4df2f535d80f6e0eccd",
        "vangogh.csv": "9d0b141b6674b5ef93be5a38c4d220ec56ca1ec096cdfdb5baf0932deca72362",
        "church.csv": "4987e201148cfa3bd3dabfb67e5681ca09e64155cdadf03b0a0c295269d2c18c",
        "parachute.csv": "f44fdef671aecf3f759ef53101e23b5cd614e3da6e2021c3c3d0a1c35a5fe0e5",
        "tench.csv": "6d5fc0988e40e7ef97e035031badf52e6a0e971b96be4bf277c2eee3c55f546d",
        "garbage_truck.csv": "e561240be67ea653bac8dd22bc31d44ae6ccb88268b2e306448eea39feefa6cd",
        "violence.csv": "548c603038d559e71d9b0ecce8aa5867e41869ef948a227fb4be29d4c2bb1b13",
        "illegal.csv": "2de0690881b50d072f634c77159152ea4fb2d4adbfed1d717f2232c5c68f1100",
        "i2p.csv": "76f7c20b4d7bc51de20596de1fcd05e519f0f7f351f82f1f33ce0a44cd45a34b",
        "coco_10k.csv": "3c4eddc1fa5458d685d6ef7175bc8d501d8a9f0a86d17c22b898ce5f3942376e",
    }.items()
}


def read(path: str | os.PathLike) -> PromptSet:
    """A file of prompts. A .csv has a column prompt and may have one of `SEEDS`, `GUIDANCES`, `CASES`; a .txt, or a
    file without a suffix, has one prompt a line, empty lines left out.

    Raises `AegisError` for other files, and for a .csv naming every line that cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".txt", ""):
        raise AegisError(
            f"{path}: prompts are read from a .csv, or from a .txt with one a line: save it as one of these"
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AegisError(f"{path} is not UTF-8 ({error}): save it as that") from None
    said: dict[str, set[str]] = {}
    if is_table(path):
        prompts = _rows(path, text, said)
    else:
        # Of any system; not by splitlines(), for which U+2028 is one too.
        prompts = [Prompt(line.strip()) for line in re.split(r"\r\n?|\n", text) if line.strip()]
    if not prompts:
        raise AegisError(f"{path} has no prompts")
    return PromptSet(path, prompts, said, hashlib.sha256(content).hexdigest())


def is_table(path: Path) -> bool:
    """Whether `read` reads a file as a .csv."""
    return path.suffix.lower() == ".csv"


def unused(path: Path, said: dict[str, set[str]], settings: Mapping) -> list[str]:
    """Notes on what `read` found said of settings, where it is not what all prompts are sampled with."""
    return [
        f"{path}: its own {name} is not used, {name} is {settings[name]!r} for all prompts"
        for name, texts in said.items()
        if not all(_says(text, settings[name]) for text in texts)
    ]


def _says(text: str, value) -> bool:
    try:
        return table.number(text) == float(value)
    except ValueError:
        return text == str(value)


def _rows(path: Path, text: str, said: dict[str, set[str]]) -> list[Prompt]:
    columns, rows, problems = table.read(text)
    if not columns:
        table.refuse(path, problems)
    names = {name.lower(): name for name in columns}
    if "prompt" not in names:
        raise AegisError(f"{path} has no column prompt (its columns: {', '.join(names) or 'none'})")
    table.refuse(path, problems)
    seed_column, guidance_column, case_column = (
        next((names[name] for name in known if name in names), None) for known in (SEEDS, GUIDANCES, CASES)
    )
    settings = [(_SETTINGS[name], column) for name, column in names.items() if name in _SETTINGS]
    prompts = []
    for line, row in rows:
        where = f"{path}, line {line}"
        if row[names["prompt"]] is None:
            raise AegisError(f"{where}: no prompt")
        seed = (seed_column and row[seed_column]) or ""
        seed = seed_of(seed, seed_column, where) if seed.strip() else None
        guidance = None if guidance_column is None else _guidance(row[guidance_column], guidance_column, where)
        case = "" if case_column is None else (row[case_column] or "").strip()
        prompts.append(Prompt(row[names["prompt"]], seed, guidance, case))
        for name, column in settings:
            cell = row[column] or ""
            if cell.strip() or name in _MAY_BE_EMPTY:
                said.setdefault(name, set()).add(cell)
    return prompts


def seed_of(text: str | None, column: str, where: str) -> int:
    """The seed in a cell. Raises `AegisError` naming where for what is no whole number."""
    text = text or ""
    try:
        if text.strip().isdecimal():
            return int(text)  # ValueError for thousands of digits, too
        number = table.number(text)  # pandas writes 7 as 7.0 where other rows have none
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise AegisError(f"{where}: {column} = {text!r:.80}, wanted a whole number")
    return int(number)


def _guidance(text: str | None, column: str, where: str) -> float | None:
    if not (text or "").strip():
        return None
    try:
        number = table.number(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise AegisError(f"{where}: {column} = {text!r}, wanted a number")
    return number


def check_index(folder: Path, instead: str = "choose another --out") -> dict[str, dict]:
    """{file: row} of an index that lies in the folder already. Raises `AegisError` for what is no whole one.

    instead: what to do about that.
    """
    path = folder / INDEX
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            if tuple(reader.fieldnames or ()) == COLUMNS:
                return {row["file"]: _whole(row, f"{path}, line {reader.line_num}", instead) for row in reader}
        except (csv.Error, UnicodeDecodeError):
            pass
    raise AegisError(f"{path} is no index of this version's aegis sample: {instead}")


def _whole(row: dict, where: str, instead: str) -> dict[str, str]:
    """A row of the index; csv puts surplus cells under None, and None for missing ones."""
    if None in row or None in row.values():
        raise AegisError(f"{where}: wanted {len(COLUMNS)} cells, one for each column: mend it or {instead}")
    return row


def write_index(folder: Path, rows: dict[str, dict]) -> None:
    """Writes {file: row} as prompts.csv, which `read` takes as well."""
    write_text(folder / INDEX, csv_text([COLUMNS, *([rows[file][name] for name in COLUMNS] for file in sorted(rows))]))


def csv_text(rows: Iterable[Sequence]) -> str:
    """A .csv of these rows that reads back as it was, whatever is in its cells; lines end with \\n."""
    lines: list[str] = []
    # The writer quotes the characters of its own line end alone, so that of a \n would leave a \r in a cell bare.
    csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n").writerows(rows)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)
