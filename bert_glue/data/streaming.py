"""Reads a file of any size, or standard input, as tables with a fixed number of rows, in constant memory.

The same parsers, rules and messages as `table_files`, which reads files whole: what differs is that an
error in line 1,000,000 is found when the rows before it have been handed out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from bert_glue.data.json_rows import json_lines
from bert_glue.data.readers import csv_records, csv_rows, from_arrow, open_parquet, parquet_errors, tsv_rows
from bert_glue.data.tables import Problems, Table, check_line_ends, check_separated, decoded, without_mark
from bert_glue.errors import DataError

STREAMED = ("csv", "tsv", "jsonl", "parquet")
STANDARD = Path("-")  # standard input or output
_BLOCK = 1 << 20  # bytes read at once

Item = TypeVar("Item")


def stream_tables(path: Path, kind: str, rows: int) -> Iterator[Table]:
    """The rows of a file in tables of `rows` each, the last one smaller; origin and lines as in the file.

    Args:
        path: `STANDARD` reads standard input.
        kind: one of STREAMED.

    Raises:
        DataError: as `table_files.read_table`, when the rows before have been yielded.
    """
    if kind == "parquet":
        yield from _parquet(path, rows)
        return
    origin = "stdin" if path == STANDARD else str(path)
    count = 0
    try:
        with sys.stdin.buffer if path == STANDARD else path.open("rb") as file:
            for table in _TEXT_KINDS[kind](origin, text_lines(file, origin), rows):
                count += len(table)
                yield table
    except OSError as error:
        raise DataError(f"{origin}: cannot be read: {error.strerror}") from None
    if not count:
        raise DataError(f"{origin}: has no rows")


def text_lines(file: BinaryIO, origin: str) -> Iterator[str]:
    """Lines with their LF; a CRLF stays one.

    Raises:
        DataError: not text in UTF-8; file:line.
    """
    number, parts, is_start = 1, [], True
    while block := file.read(_BLOCK):
        raw = without_mark(origin, block) if is_start else block
        if b"\0" in raw:  # a device such as /dev/zero has no line end to wait for
            decoded(origin, b"".join((*parts, raw)), number)
        is_start = False
        whole, newline, rest = raw.rpartition(b"\n")
        if not newline:
            parts.append(rest)  # joined once: a line of many blocks costs its length, not the square of it
            continue
        text = decoded(origin, b"".join((*parts, whole, newline)), number)
        parts = [rest]
        number += text.count("\n")
        # Not splitlines(): it also splits at separators that occur inside texts.
        yield from (line + "\n" for line in text.split("\n")[:-1])
    if rest := b"".join(parts):
        text = decoded(origin, rest, number)
        if number == 1:
            check_line_ends(origin, text)
        yield text


def _without_blank_end(items: Iterable[Item], is_blank: Callable[[Item], bool]) -> Iterator[Item]:
    """The items without the blank ones at the end, which are not rows."""
    held: list[Item] = []
    for item in items:
        held.append(item)
        if not is_blank(item):
            yield from held
            held.clear()


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _tsv(origin: str, lines: Iterator[str], rows: int) -> Iterator[Table]:
    plain = (line.removesuffix("\n").removesuffix("\r") for line in lines)
    plain = _without_blank_end(plain, lambda line: not line)
    names = next(plain, "").split("\t")
    check_separated(origin, names, "\t")
    number = 2
    for chunk in _chunks(plain, rows):
        yield tsv_rows(origin, names, chunk, number)
        number += len(chunk)


def _csv(origin: str, lines: Iterator[str], rows: int) -> Iterator[Table]:
    problems = Problems(origin)
    records = _without_blank_end(csv_records(origin, lines, problems), lambda record: not record[1])
    names = next(records, (1, []))[1]
    problems.raise_any()
    check_separated(origin, names, ",")
    for chunk in _chunks(records, rows):
        yield csv_rows(origin, names, chunk, problems)
    problems.raise_any()


def _jsonl(origin: str, lines: Iterator[str], rows: int) -> Iterator[Table]:
    number = 1
    for chunk in _chunks(_without_blank_end(lines, str.isspace), rows):
        yield json_lines(origin, chunk, number)
        number += len(chunk)


def _parquet(path: Path, rows: int) -> Iterator[Table]:
    first = 1
    with parquet_errors(path):
        batches = open_parquet(path).iter_batches(rows)
    while True:
        with parquet_errors(path):
            batch: Any = next(batches, None)
        if batch is None:
            break
        if batch.num_rows:
            yield from_arrow(_as_table(batch), str(path), first)
            first += batch.num_rows
    if first == 1:
        raise DataError(f"{path}: has no rows")


def _as_table(batch: Any) -> Any:
    import pyarrow

    return pyarrow.Table.from_batches([batch])


_TEXT_KINDS: dict[str, Callable[[str, Iterator[str], int], Iterator[Table]]] = {
    "csv": _csv,
    "tsv": _tsv,
    "jsonl": _jsonl,
}
