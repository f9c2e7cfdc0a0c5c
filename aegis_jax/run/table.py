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

    A cell is None where its row has none. Without columns either the file is empty or its first row cannot be read.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns, rows, problems, line = [], [], [], 0
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames, line = columns, 1
        for row in reader:
            line = reader.line_num
            surplus = row.pop(None, ())
            if any(cell.strip() for cell in surplus):  # a comma at the end, as spreadsheets write it, cuts nothing
                count = len(columns) + len(surplus)
                problems.append((line, f"{count} cells, but {len(columns)} columns (quote a cell with a comma)"))
            else:
                rows.append((line, row))
    except csv.Error as error:
        unclosed = str(error) == "unexpected end of data"
        problems.append((line + 1, "a quote that is opened in this row is never closed" if unclosed else str(error)))
    return columns, rows, problems


def refuse(path: Path, problems: list[tuple[int, str]]) -> None:
    """Raises an `AegisError` that lists the problems, if there are any."""
    if problems:
        listed = [f"line {line}: {what}" for line, what in sorted(problems)[:LISTED]]
        more = [f"and {len(problems) - LISTED} lines more"] * (len(problems) > LISTED)
        raise AegisError(f"{path}: {'; '.join(listed + more)}")
