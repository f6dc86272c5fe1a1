"""Reads csv, tsv and parquet files, and json by `json_rows`, into columns that still know their line numbers.

Not pandas and not the csv reader of `datasets`: those turn the text `NA` into a missing value, merge
rows at a stray quote, skip broken lines and name no line in their errors. Here every row of the file
becomes a row of the table, or the file is refused with file:line.
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
    """Reads a data file by its suffix; every value is a str in csv and tsv.

    Args:
        drop_broken: leave out rows of csv and tsv with too many or too few columns; a note of the table counts them.

    Raises:
        DataError: unknown suffix, unreadable, or broken anywhere; names file:line.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; choices: {', '.join(_READERS)}")
    return reader(path, drop_broken=drop_broken) if reader in (read_csv, read_tsv) else reader(path)


class BrokenRowsError(DataError):
    """Rows have more or fewer columns than the file.

    Args:
        width: columns of the file.
    """

    def __init__(self, text: str, width: int):
        super().__init__(text)
        self.width = width


def _left_out(ragged: Problems, width: int, drop_broken: bool) -> tuple[str, ...]:
    """A note on the broken rows that are left out.

    Raises:
        BrokenRowsError: there are some, and they are not to be left out.
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
            f"{len(fields)} columns where {width} are expected: a separator too many or too few, "
            f"or a line break inside a text{cr_note(problems.origin, ' '.join(fields))}",
        )


def read_tsv(
    path: Path, header: bool = True, only: Collection[str | int] | None = None, drop_broken: bool = False
) -> Table:
    """Reads tab-separated lines as GLUE has them: no quoting at all, a quote is a character.

    Lines end at LF or CRLF, never at other Unicode line separators, which occur inside texts. Texts
    with tabs or line breaks cannot be stored so: csv or json can. 400,000 rows take about a second.

    Args:
        header: the first line has names; otherwise columns are 0-based positions.
        only: columns to keep (GLUE files carry parse trees of ten times the text); default: all.
        drop_broken: see `read_table`.

    Raises:
        DataError: not a text file, a line with another number of columns, no rows, a doubled name.
    """
    # Blank lines at the very end are no rows; anywhere else they are an error.
    text = read_text(path)
    check_line_ends(str(path), text)
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    first = lines[0].split("\t")
    names: Sequence = first if header else range(len(first))
    if header:
        check_separated(str(path), first, "\t")
    if only is not None and not set(only) <= set(names):
        only = None  # a column is missing: the error that follows shall list those that are there
    return tsv_rows(str(path), names, lines[int(header) :], int(header) + 1, only, drop_broken=drop_broken)


def tsv_rows(
    origin: str,
    names: Sequence,
    lines: list[str],
    first_line: int,
    only: Collection[str | int] | None = None,
    drop_broken: bool = False,
) -> Table:
    """Lines of a tsv file, without their ends, as a table.

    Args:
        names: of all columns.
        first_line: number of the first of the lines.
        drop_broken: see `read_table`.

    Raises:
        DataError: as `read_tsv`.
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
    """Column names of a tsv file (its first line), read without the rest; [] if unreadable."""
    try:
        with open_plain(path) as file:
            first = file.readline(_LONGEST_HEADER)
        return first.removeprefix(codecs.BOM_UTF8).decode().rstrip("\r\n").split("\t")
    except (OSError, UnicodeDecodeError):
        return []


def csv_records(origin: str, lines: Iterable[str], problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """Yields (line the record starts at, fields); a quoted field may span lines.

    Args:
        lines: with their ends; ends by a lone CR are none, as it is a character here.
        problems: gets a broken record, after which nothing more is yielded.
    """
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, refuses long documents
    latest = ""

    def remembered() -> Iterator[str]:
        nonlocal latest
        for latest in lines:  # noqa: UP028 - the line an error is about
            yield latest

    reader = csv.reader(remembered(), strict=True)
    start = 1
    try:
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        # Where a closing quote is missing the reader only notices at the end of the file.
        reason = f"{error}{cr_note(origin, latest.rstrip())}"
        problems.add(f"{origin}:{start}", f"broken csv in the row that starts here: {reason}")


def read_csv(path: Path, drop_broken: bool = False) -> Table:
    """Reads comma-separated rows with RFC 4180 quoting; the first row has the names.

    Args:
        drop_broken: see `read_table`.

    Raises:
        DataError: not a text file, broken quoting, a ragged row, no rows, a doubled name.
    """
    problems = Problems(str(path))
    text = read_text(path).rstrip("\r\n")
    check_line_ends(str(path), text)
    # newline="\n": Python would otherwise end records at a lone CR too.
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
    """Records of a csv file as a table.

    Args:
        problems: what `csv_records` could not read.
        drop_broken: see `read_table`.

    Raises:
        DataError: as `read_csv`.
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
    """Reads a parquet file, with the class names `datasets` stores in its metadata.

    Raises:
        DataError: not a parquet file, damaged, or no rows.
    """
    with parquet_errors(path):
        # Not read_table(path): it would take folder names such as `a=b` for columns.
        table = open_parquet(path).read()
    return from_arrow(table, str(path))


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`; open and read it within `parquet_errors`."""
    import pyarrow.parquet

    open_plain(path).close()  # pyarrow would wait for the writer of a pipe
    return pyarrow.parquet.ParquetFile(path)


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Raises DataError where pyarrow cannot open or read a file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        if path.is_file() and is_lfs_pointer(open_plain(path).read(64)):
            raise DataError(f"{path}: is a Git-LFS pointer, not the data; run git lfs pull") from None
        raise DataError(f"{path}: cannot be read as parquet: {first_line(error)}") from None


def from_arrow(table: Any, origin: str, first_row: int = 1) -> Table:
    """A `pyarrow.Table` as a Table of Python values.

    Args:
        first_row: number of its first row in the file.

    Raises:
        DataError: doubled column names, no rows, text that is not UTF-8, or broken metadata.
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
    except (OverflowError, ValueError) as error:  # dates out of python's range, time zones that nobody knows
        raise DataError(f"{origin}: column {name!r} cannot be read: {first_line(error)}") from None


def _is_readable(value: Any) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Names of integer classes from the schema metadata key `huggingface` (datasets' format)."""
    described = json.loads(metadata.get(b"huggingface", b"{}"))
    return class_names_of(described.get("info", {}).get("features", {}))


def class_names_of(features: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Names of integer classes, and of lists of them, by column.

    Args:
        features: of `datasets`, as its `to_dict` gives them.
    """
    found = {}
    for name, feature in features.items():
        if isinstance(feature, list) and len(feature) == 1:  # how earlier versions write a list
            feature = feature[0]
        elif isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            found[name] = tuple(feature["names"])
    return found


_READERS = dict(zip(DATA_SUFFIXES, (read_csv, read_tsv, read_json, read_json, read_parquet), strict=True))
