"""Columns that know the line of each row, and the list of problems for which a broken file is refused."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from bert_glue.errors import DataError
from bert_glue.storage.files import is_lfs_pointer, open_plain

SHOWN_PROBLEMS = 5


class Problems:
    """Collects what is wrong with one file, to tell the user at once.

    Args:
        origin: file path or data set, for the line that counts what is not shown.
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.lines: list[str] = []
        self.count = 0

    def add(self, place: str, text: str) -> None:
        """Notes a problem at `place` ("file:line"); only the first five keep their text."""
        self.add_line(f"{place}: {text}")

    def add_line(self, line: str) -> None:
        """Notes a problem whose line already names its place."""
        self.count += 1
        if self.count <= SHOWN_PROBLEMS:
            self.lines.append(line)

    def raise_any(self) -> None:
        """Raises DataError if there was a problem: the first five, and how many more."""
        if self.count > SHOWN_PROBLEMS:
            self.lines.append(f"{self.origin}: {self.count - SHOWN_PROBLEMS} more problems like these")
        if self.count:
            raise DataError("\n".join(self.lines))


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and the place of each row in its file.

    Args:
        origin: file path or data set name.
        columns: name (or 0-based position, in a file without header) -> values, one per row.
        places: 1-based line or row number of each row.
        unit: "line": places are lines of the file; "row": rows of a file without lines.
        class_names: column -> names of its integer classes, if the file has them.
        notes: lines for the user about how the file was read.
    """

    origin: str
    columns: dict[Any, list]
    places: Sequence[int]
    unit: str = "line"
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    def where(self, row: int) -> str:
        """The place of 0-based `row` for an error message: "file:12" or "file row 12"."""
        gap = ":" if self.unit == "line" else " row "
        return f"{self.origin}{gap}{self.places[row]}"

    @property
    def place(self) -> str:
        """The place of the column names, for an error message."""
        return f"{self.origin}:1" if self.unit == "line" else self.origin

    @property
    def names(self) -> str:
        """The names of all columns, for an error message."""
        return ", ".join(map(str, self.columns))

    def take(self, rows: Sequence[int]) -> Table:
        """A table of some rows, by 0-based number."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, places=[self.places[row] for row in rows])

    def column(self, name: str | int) -> list:
        """Values of one column.

        Raises:
            DataError: there is no such column; the message has the choices.
        """
        if name not in self.columns:
            raise DataError(f"{self.place}: no column {name!r}; columns: {self.names}")
        return self.columns[name]

    def renamed(self, names: dict[Any, str]) -> Table:
        """A table of the columns in `names` only, under their new names.

        Raises:
            DataError: one of them is missing.
        """
        return replace(self, columns={new: self.column(old) for old, new in names.items()})


def pieces(column: list) -> Iterator[list]:
    """Parts of a column with 10,000 rows each; joining all of them would need a second copy of the text."""
    for first in range(0, len(column), 10_000):
        yield column[first : first + 10_000]


def check_header(origin: str, names: Sequence[str]) -> None:
    """Raises DataError where two columns have the same name: one would silently hide the other."""
    doubled = sorted(name for name, count in Counter(names).items() if count > 1)
    if doubled:
        raise DataError(f"{origin}: column name more than once: {', '.join(map(repr, doubled))}")


_SEPARATORS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}


def check_separated(origin: str, names: Sequence[str], separator: str) -> None:
    """Raises DataError where a header shows that another character separates the fields, or for a doubled name.

    Args:
        origin: the file; its first line has the header.
        names: fields of the header, parted at `separator`.
    """
    if names and names[0].lower().startswith("sep=") and len(names) <= 2:
        raise DataError(f"{origin}:1: is Excel's line about the separator, not the header; delete this line")
    for other, name in _SEPARATORS.items():
        if other != separator and names and all(other in field for field in names):
            raise DataError(
                f"{origin}:1: the fields are separated by {name}, not by {_SEPARATORS[separator]}; write them with "
                f'commas: python -c "import csv, sys; csv.writer(sys.stdout).writerows('
                f'csv.reader(sys.stdin, delimiter={other!r}))" <{origin} >NEW.csv'
            )
    check_header(f"{origin}:1", names)


def check_line_ends(origin: str, text: str) -> None:
    """Raises DataError where the lines of a whole text end in CR alone, so that it seems to have one line."""
    text = text.rstrip()
    if "\r" in text and "\n" not in text:
        raise DataError(f"{origin}: its lines end in a lone CR, not in LF or CRLF; {_lf_command(origin)}")


def _lf_command(origin: str) -> str:
    return f"tr '\\r' '\\n' <{origin} >NEW writes LF"


def cr_note(origin: str, text: str) -> str:
    """Half a sentence behind what is wrong with a row that holds a lone CR, "" for other rows."""
    if "\r" not in text.replace("\r\n", ""):
        return ""
    return f" (the row has a lone CR; if lines end so, {_lf_command(origin)})"


def build_table(origin: str, names: Sequence, columns: list[list], places: Sequence[int], unit: str = "line") -> Table:
    """A Table; raises DataError if it would have no rows."""
    if not places:
        raise DataError(f"{origin}: has no rows")
    return Table(origin, dict(zip(names, columns, strict=True)), places, unit)


def read_text(path: Path) -> str:
    """Content of a UTF-8 file, without byte order mark, line ends untouched.

    Raises:
        DataError: cannot be read, empty, UTF-16, not UTF-8, NUL bytes, or a Git-LFS pointer.
    """
    try:
        with open_plain(path) as file:
            raw = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    raw = without_mark(str(path), raw)
    if not raw.strip():
        raise DataError(f"{path}: is empty")
    return decoded(str(path), raw)


# How a file begins that is no text in UTF-8. UTF-32 first: its mark begins with that of UTF-16.
_FOREIGN_STARTS = {
    codecs.BOM_UTF32_LE: "UTF-32; save it as UTF-8",
    codecs.BOM_UTF32_BE: "UTF-32; save it as UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"PK\x03\x04": "a zip archive, as Excel's workbooks are; unpack it, or save it as csv in UTF-8",
    b"PAR1": "parquet; let its name end in .parquet",
}


def without_mark(origin: str, raw: bytes) -> bytes:
    """The beginning of a text file without its byte order mark.

    Raises:
        DataError: it is UTF-16 or UTF-32, a Git-LFS pointer, an archive or parquet.
    """
    for start, what in _FOREIGN_STARTS.items():
        if raw.startswith(start):
            raise DataError(f"{origin}:1: is {what}")
    if is_lfs_pointer(raw):
        raise DataError(f"{origin}:1: is a Git-LFS pointer, not the data; run git lfs pull")
    return raw.removeprefix(codecs.BOM_UTF8)


def decoded(origin: str, raw: bytes, first_line: int = 1) -> str:
    """Text of whole lines of a file.

    Args:
        first_line: number of the first of them.

    Raises:
        DataError: not UTF-8, or a NUL byte; file:line.
    """
    nul = raw.find(b"\0")
    if nul >= 0:
        line = raw.count(b"\n", 0, nul) + first_line
        raise DataError(f"{origin}:{line}: has a NUL byte; a text file in UTF-8 is needed")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        _raise_undecodable(origin, raw, first_line)


def _raise_undecodable(origin: str, raw: bytes, first_line: int) -> NoReturn:
    problems = Problems(origin)
    for number, line in enumerate(raw.split(b"\n"), first_line):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            problems.add(f"{origin}:{number}", f"not UTF-8 (byte 0x{line[error.start]:02x}); save it as UTF-8")
    problems.raise_any()
