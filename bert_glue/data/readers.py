"""Reads csv, tsv and parquet files (and json, by `json_rows`) into columns that know their line numbers.

Pandas and the csv reader of `datasets` turn the text `NA` into a missing value, merge rows at a stray quote, skip
broken lines, and do not name the line in their errors. Here every row of the file becomes a row of the table, or the
file is refused with file:line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import DATA_SUFFIXES
from bert_glue.data.json_rows import read_json
from bert_glue.data.tables import (
    Problems,
    Table,
    build_table,
    check_header,
    check_line_ends,
    check_separated,
    cr_note,
    read_text,
)
from bert_glue.errors import DataError, first_line
from bert_glue.storage.files import is_lfs_pointer, open_plain

# Files that `datasets` and the hub put beside rows.
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def is_data_file(path: Path) -> bool:
    """Whether a file of a folder holds rows, by its name."""
    return path.suffix.lower() in DATA_SUFFIXES and path.name not in _NOT_ROWS and path.name[0] not in "._"


def read_table(path: Path, drop_broken: bool = False) -> Table:
    """Reads a data file by its suffix. In csv and tsv every value is a str.

    Args:
        drop_broken: drop rows of csv and tsv with too many or too few columns. A note of the table counts them.

    Raises:
        DataError: the suffix is unknown, or the file cannot be read or is broken (file:line).
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; choices: {', '.join(_READERS)}")
    return reader(path, drop_broken=drop_broken) if reader in (read_csv, read_tsv) else reader(path)


class BrokenRowsError(DataError):
    """Rows have more or fewer columns than the header.

    Args:
        width: the number of columns in the header.
    """

    def __init__(self, text: str, width: int):
        super().__init__(text)
        self.width = width


def _left_out(ragged: Problems, width: int, drop_broken: bool) -> tuple[str, ...]:
    """A note on the broken rows that are dropped.

    Raises:
        BrokenRowsError: there are broken rows, and `drop_broken` is False.
    """
    if drop_broken and ragged.count:
        return (f"{ragged.origin}: {ragged.count} broken rows are left out; the first is {ragged.lines[0]}",)
    try:
        ragged.raise_any()
    except DataError as error:
        raise BrokenRowsError(str(error), width) from None
    return ()


def _add_ragged(problems: Problems, place: str, fields: list[str], width: int) -> None:
    if fields in ([], [""]):
        problems.add(place, "the line is empty")
    else:
        problems.add(
            place,
            f"{len(fields)} columns instead of {width}: there are too many or too few separators, "
            f"or a line break inside a text{cr_note(problems.origin, ' '.join(fields))}",
        )


def read_tsv(
    path: Path, header: bool = True, only: Collection[str | int] | None = None, drop_broken: bool = False
) -> Table:
    """Reads tab-separated lines as in GLUE: without quoting, so that a quote is an ordinary character.

    Lines end at LF or CRLF, but not at other Unicode line separators, which occur inside texts. The format cannot hold
    texts with tabs or line breaks; csv and json can. 400,000 rows take about one second.

    Args:
        header: True if the first line has the names. False: the columns are named by their 0-based positions.
        only: the columns to keep (GLUE files have parse trees ten times as long as the text). None: all.
        drop_broken: see `read_table`.

    Raises:
        DataError: the file is not a text file, has no rows, repeats a name, or a line has another number of columns.
    """
    # Blank lines at the end of the file are ignored; anywhere else they are an error.
    text = read_text(path)
    check_line_ends(str(path), text)
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    first = lines[0].split("\t")
    names: Sequence = first if header else range(len(first))
    if header:
        check_separated(str(path), first, "\t")
    if only is not None and not set(only) <= set(names):
        only = None  # a column is missing, so read all: the error that follows lists the existing ones
    return tsv_rows(str(path), names, lines[int(header) :], int(header) + 1, only, drop_broken=drop_broken)


def tsv_rows(
    origin: str,
    names: Sequence,
    lines: list[str],
    first_line: int,
    only: Collection[str | int] | None = None,
    drop_broken: bool = False,
) -> Table:
    """The lines of a tsv file, without their line ends, as a table.

    Args:
        names: the names of all columns.
        first_line: the line number of the first line.
        drop_broken: see `read_table`.

    Raises:
        DataError: as in `read_tsv`.
    """
    width = len(names)
    kept = [at for at, name in enumerate(names) if only is None or name in only]
    columns: list[list[str]] = [[] for _ in kept]
    places: list[int] = []
    ragged = Problems(origin)
    for number, line in enumerate(lines, first_line):
        fields = line.split("\t")
        if len(fields) != width:
            _add_ragged(ragged, f"{origin}:{number}", fields, width)
            continue
        places.append(number)
        for column, at in zip(columns, kept, strict=True):
            column.append(fields[at])
    notes = _left_out(ragged, width, drop_broken)
    return replace(build_table(origin, [names[at] for at in kept], columns, places), notes=notes)


_LONGEST_HEADER = 1 << 20  # bytes


def header_of(path: Path) -> list[str]:
    """The column names of a tsv file; reads only the first line. [] if it cannot be read."""
    try:
        with open_plain(path) as file:
            first = file.readline(_LONGEST_HEADER)
        return first.removeprefix(codecs.BOM_UTF8).decode().rstrip("\r\n").split("\t")
    except (OSError, UnicodeDecodeError):
        return []


def csv_records(origin: str, lines: Iterable[str], problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number of the start of the record, fields). A quoted field may span lines.

    Args:
        lines: the lines with their line ends. A single CR does not end a line here.
        problems: receives a broken record, after which nothing more is yielded.
    """
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB refuses long documents
    latest = ""

    def remembered() -> Iterator[str]:
        nonlocal latest
        for latest in lines:  # noqa: UP028 - keeps the line for the error message
            yield latest

    reader = csv.reader(remembered(), strict=True)
    start = 1
    try:
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        # The reader notices a missing closing quote only at the end of the file, so name the start of the record.
        reason = f"{error}{cr_note(origin, latest.rstrip())}"
        problems.add(f"{origin}:{start}", f"broken csv in the row that starts here: {reason}")


def read_csv(path: Path, drop_broken: bool = False) -> Table:
    """Reads comma-separated rows with RFC 4180 quoting. The first row has the names.

    Args:
        drop_broken: see `read_table`.

    Raises:
        DataError: the file is not a text file, has no rows, repeats a name, has broken quoting, or a row has another
            number of columns.
    """
    problems = Problems(str(path))
    text = read_text(path).rstrip("\r\n")
    check_line_ends(str(path), text)
    # With newline="\n" records do not end at a single CR.
    records = csv_records(str(path), io.StringIO(text, newline="\n"), problems)
    names = next(records, (1, []))[1]
    problems.raise_any()
    check_separated(str(path), names, ",")
    return csv_rows(str(path), names, records, problems, drop_broken)


def csv_rows(
    origin: str,
    names: list[str],
    records: Iterable[tuple[int, list[str]]],
    problems: Problems,
    drop_broken: bool = False,
) -> Table:
    """The records of a csv file as a table.

    Args:
        problems: the records that `csv_records` could not read.
        drop_broken: see `read_table`.

    Raises:
        DataError: as in `read_csv`.
    """
    rows: list[list[str]] = []
    places: list[int] = []
    ragged = Problems(origin)
    for line, fields in records:
        if len(fields) != len(names):
            _add_ragged(ragged, f"{origin}:{line}", fields, len(names))
        else:
            rows.append(fields)
            places.append(line)
    problems.raise_any()
    notes = _left_out(ragged, len(names), drop_broken)
    return replace(build_table(origin, names, [list(c) for c in zip(*rows, strict=True)], places), notes=notes)


def read_parquet(path: Path) -> Table:
    """Reads a parquet file, with the class names that `datasets` stores in its metadata.

    Raises:
        DataError: the file is not parquet, is damaged, or has no rows.
    """
    with parquet_errors(path):
        # pyarrow.parquet.read_table(path) would add folder names such as `a=b` as columns.
        table = open_parquet(path).read()
    return from_arrow(table, str(path))


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Open and read it within `parquet_errors`."""
    import pyarrow.parquet

    open_plain(path).close()  # refuses pipes, on which pyarrow would wait for a writer
    return pyarrow.parquet.ParquetFile(path)


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Raises DataError if pyarrow cannot open or read a file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        if path.is_file() and is_lfs_pointer(open_plain(path).read(64)):
            raise DataError(f"{path}: is a Git-LFS pointer, not the data; run git lfs pull") from None
        raise DataError(f"{path}: cannot be read as parquet: {first_line(error)}") from None


def from_arrow(table: Any, origin: str, first_row: int = 1) -> Table:
    """Converts a `pyarrow.Table` to a Table of Python values.

    Args:
        first_row: the number of its first row in the file.

    Raises:
        DataError: a column name is repeated, there are no rows, a text is not UTF-8, or the metadata is broken.
    """
    names = table.column_names
    check_header(origin, names)
    columns = [_arrow_values(table.column(name), name, origin, first_row) for name in names]
    built = build_table(origin, names, columns, range(first_row, first_row + table.num_rows), "row")
    try:
        return replace(built, class_names=_class_names(table.schema.metadata or {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{origin}: the class names in its metadata cannot be read: {error}") from None


def _arrow_values(column: Any, name: str, origin: str, first_row: int) -> list:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        row = next(at for at, value in enumerate(column, first_row) if not _is_readable(value))
        raise DataError(f"{origin} row {row}: column {name!r} is not UTF-8") from None
    except (OverflowError, ValueError) as error:  # dates beyond Python's range, unknown time zones
        raise DataError(f"{origin}: column {name!r} cannot be read: {first_line(error)}") from None


def _is_readable(value: Any) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """The names of integer classes, from the metadata key `huggingface` that `datasets` writes."""
    described = json.loads(metadata.get(b"huggingface", b"{}"))
    return class_names_of(described.get("info", {}).get("features", {}))


def class_names_of(features: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names of integer classes, and of lists of them, by column.

    Args:
        features: the features of a `datasets` data set, from `to_dict`.
    """
    found = {}
    for name, feature in features.items():
        if isinstance(feature, list) and len(feature) == 1:  # a list, as earlier versions write it
            feature = feature[0]
        elif isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            found[name] = tuple(feature["names"])
    return found


_READERS = dict(zip(DATA_SUFFIXES, (read_csv, read_tsv, read_json, read_json, read_parquet), strict=True))
