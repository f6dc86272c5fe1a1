"""Reads JSON files of rows, whichever of the three usual forms they have, with line numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bert_glue.errors import DataError
from bert_glue.tables import Problems, Table, build_table, read_text

_JSON_SPACE = re.compile(r"[ \t\r\n]*")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key occurs more than once in an object")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles)


def read_json(path: Path) -> Table:
    """Reads a list of objects, {"data": [objects]}, or one object a line; told apart by content.

    Columns are the keys of all objects; a key an object lacks is None there.

    Raises:
        DataError: not a text file, not JSON, a row that is no object, no rows.
    """
    text = read_text(path)
    start, _ = _skip(text, 0, 1)
    if text.startswith("[", start):
        return _records(str(path), list(_list_rows(path, text, start)), "line")
    # Stops at the first object's end, so this costs nothing for a file of one object a line.
    document = _parse_or_none(text)
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        return _records(str(path), list(enumerate(document["data"], 1)), "row")
    return json_lines(str(path), text.rstrip().split("\n"), 1)


def json_lines(origin: str, lines: Iterable[str], first_line: int) -> Table:
    """One object a line as a table.

    Args:
        first_line: number of the first of the lines.

    Raises:
        DataError: a line is not JSON or no object.
    """
    problems = Problems(origin)
    rows = list(_line_rows(origin, lines, first_line, problems))
    problems.raise_any()
    return _records(origin, rows, "line")


def _parse_or_none(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    return f"not JSON that can be read: {error}"


def _line_rows(origin: str, lines: Iterable[str], first: int, problems: Problems) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, first):
        try:
            yield number, _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            problems.add(f"{origin}:{number}", _json_problem(error) if line.strip() else "the line is empty")


def _skip(text: str, at: int, line: int) -> tuple[int, int]:
    """Position and line of the next character that is not white space."""
    end = _JSON_SPACE.match(text, at).end()
    return end, line + text.count("\n", at, end)


def _list_rows(path: Path, text: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yields (line, element) of the list that opens at `start`; `json.load` would forget the lines."""
    at, line = _skip(text, start + 1, text.count("\n", 0, start) + 1)
    try:
        while not text.startswith("]", at):
            row, end = _DECODER.raw_decode(text, at)
            yield line, row
            at, line = _skip(text, end, line + text.count("\n", at, end))
            if text.startswith(",", at):
                at, line = _skip(text, at + 1, line)
                if text.startswith("]", at):
                    raise ValueError("a comma before the closing ]")
            elif not text.startswith("]", at):
                raise ValueError("a comma or ] is missing")
        if text[at + 1 :].strip():
            raise ValueError("there is text after the closing ]")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', line)}: {_json_problem(error)}") from None


def _records(origin: str, rows: list[tuple[int, Any]], unit: str) -> Table:
    table = Table(origin, {}, [place for place, _ in rows], unit)
    problems = Problems(origin)
    for at, (_, row) in enumerate(rows):
        if not isinstance(row, dict):
            problems.add(table.where(at), f"{repr(row)[:40]} is not an object")
    problems.raise_any()
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    columns = [[row.get(name) for _, row in rows] for name in names]
    return build_table(origin, names, columns, table.places, unit)
