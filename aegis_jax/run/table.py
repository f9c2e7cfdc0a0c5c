"""A .csv of the user's, read strictly: an unquoted comma would cut a text silently, an open quote swallow the rows
behind it.
"""

import csv
import io
from pathlib import Path

from aegis_jax.errors import AegisError

LISTED = 20  # bad rows that are named in one message


def read(text: str) -> tuple[list[str], list[tuple[int, dict[str, str | None]]], list[tuple[int, str]]]:
    """(columns, (line, {column: cell}) of each row, (line, what is wrong) of each that cannot be read).

    A cell is None where its row has none. Rows of several cells, all of them blank, are left out: spreadsheets write
    them. Without columns either the file is empty or its first row cannot be read.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns, rows, problems, line = [], [], [], 0
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames, line = columns, 1
        plain = [name.lower() for name in columns]
        twice = [name for k, name in enumerate(columns) if name and plain.index(name.lower()) < k]
        problems += [(1, f"column {name!r} is there twice") for name in dict.fromkeys(twice)]
        for row in reader:
            line = reader.line_num
            surplus = row.pop(None, ())
            if len(columns) + len(surplus) > 1 and not any((cell or "").strip() for cell in (*row.values(), *surplus)):
                continue
            if any(cell.strip() for cell in surplus):  # a comma at the end, as spreadsheets write it, cuts nothing
                count = len(columns) + len(surplus)
                problems.append((line, f"{count} cells, but {len(columns)} columns (quote a cell with a comma)"))
            else:
                rows.append((line, row))
    except csv.Error as error:
        unclosed = str(error) == "unexpected end of data"
        problems.append((line + 1, "a quote that is opened in this row is never closed" if unclosed else str(error)))
    return columns, rows, problems


def number(text: str) -> float:
    """The number in a cell. Raises ValueError for anything else, and for the 1_000 that Python takes for one."""
    if "_" in text:
        raise ValueError(text)
    return float(text)


def refuse(path: Path, problems: list[tuple[int, str]]) -> None:
    """Raises an `AegisError` that lists the problems, if there are any."""
    if problems:
        listed = [f"line {line}: {what}" for line, what in sorted(problems)[:LISTED]]
        more = [f"and {len(problems) - LISTED} lines more"] * (len(problems) > LISTED)
        raise AegisError(f"{path}: {'; '.join(listed + more)}")
