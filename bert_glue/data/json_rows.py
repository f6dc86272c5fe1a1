"""Reads json and jsonl files: a list of objects, a list under a key, or one object a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bert_glue.data.tables import Problems, Table, build_table, check_line_ends, read_text
from bert_glue.errors import DataError

_SPARSE = 200  # cells for one value
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key occurs more than once in an object")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles)


# Keys under which exports keep their rows, besides "data", which `datasets` and pandas' orient="table" use.
_ROW_KEYS = ("rows", "records", "examples", "instances", "items")


def read_json(path: Path) -> Table:
    """Reads a list of objects, such a list under a key as in {"data": [...]}, or one object a line.

    Which one it is the content tells. Columns are the keys of all objects; a key an object lacks is None there.

    Raises:
        DataError: not a text file, not JSON, a row that is no object, columns instead of rows, no rows.
    """
    text = read_text(path)
    start, _ = _skip(text, 0, 1)
    if text.startswith("[", start):
        return _records(str(path), list(_list_rows(path, text, start)), "line")
    # Stops at the first object's end, so this costs nothing for a file of one object a line.
    document = _parse_or_none(text)
    if isinstance(document, dict):
        rows = _rows_of(path, document)
        return _records(str(path), list(enumerate(rows, 1)), "row")
    check_line_ends(str(path), text)
    _check_one_a_line(path, text, start)
    return json_lines(str(path), text.rstrip().split("\n"), 1)


def _rows_of(path: Path, document: dict[str, Any]) -> list:
    """The rows of a file that is one object: a list under a key, or the object itself as the only row."""
    if isinstance(document.get("data"), list) and not (document["data"] and isinstance(document["data"][0], list)):
        return document["data"]
    lists = [key for key, value in document.items() if _are_objects(value)]
    found = [key for key in _ROW_KEYS if key in lists]
    if not found and len(document) == 1:
        found = lists
    if found:
        return document[found[0]]
    if len(lists) > 1 and len(lists) == len(document):
        raise DataError(f"{path}: has several lists of rows: {', '.join(lists)}; write each to a file of its own")
    if document and all(isinstance(value, (list, dict)) for value in document.values()):
        keys = ", ".join(map(repr, list(document)[:5]))
        raise DataError(
            f"{path}: is one object with {keys}, as pandas writes columns; one object a row is needed: "
            'DataFrame.to_json(FILE, orient="records", lines=True)'
        )
    return [document]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _check_one_a_line(path: Path, text: str, start: int) -> None:
    try:
        _, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return  # the line that is broken is named by whoever reads the lines
    if "\n" in text[start:end]:
        raise DataError(f"{path}:1: an object spans several lines; jq -c . <{path} >NEW.jsonl puts one on each line")


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
        if text[at + 1 :].lstrip().startswith("["):
            raise ValueError('each line is a list; one object a row is needed, such as {"text": ..., "label": ...}')
        if text[at + 1 :].strip():
            raise ValueError("there is text after the closing ]")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{getattr(error, 'lineno', line)}: {_json_problem(error)}") from None


def _check_keys(origin: str, cells: int, values: int) -> None:
    """Refuse objects that share hardly any key: their table would grow with the square of the file.

    Args:
        origin: the file, for the message.
        cells: cells of a table with one column a key.
        values: values in all objects.

    Raises:
        DataError: nearly all cells would be empty.
    """
    if cells > _SPARSE * values + 1_000_000:
        raise DataError(
            f"{origin}: the objects share hardly any key (a table would have {cells} cells for {values} values); keys "
            'must be names of columns, such as {"text": ..., "label": ...}'
        )


def _records(origin: str, rows: list[tuple[int, Any]], unit: str) -> Table:
    table = Table(origin, {}, [place for place, _ in rows], unit)
    problems = Problems(origin)
    for at, (_, row) in enumerate(rows):
        if not isinstance(row, dict):
            problems.add(table.where(at), f"{repr(row)[:40]} is not an object")
    problems.raise_any()
    objects = [row for _, row in rows]
    names = list(dict.fromkeys(name for row in objects for name in row))
    _check_keys(origin, len(names) * len(rows), sum(map(len, objects)))
    columns = [[row.get(name) for row in objects] for name in names]
    return build_table(origin, names, columns, table.places, unit)
