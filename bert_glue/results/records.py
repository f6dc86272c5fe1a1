"""Reads result files as values of known types, because the folder of a run may come from somebody else.

The methods of a `Record` return numbers and texts of the right type. A value of another type counts as absent, and
the record keeps its name, so that a page can list what it leaves out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bert_glue.storage.files import read_json_object


class Record:
    """A JSON object whose values are checked when they are read.

    Args:
        values: the parsed object.
        name: the file and the place in it.
        ignored: the names of values of an unexpected type. All parts of a file share this list.
    """

    def __init__(self, values: dict[str, Any], name: str = "", ignored: list[str] | None = None):
        self.values, self.name = values, name
        self.ignored: list[str] = [] if ignored is None else ignored

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def number(self, key: str) -> float | None:
        """A finite number. None if it is absent."""
        return self._typed(key, is_number)

    def text(self, key: str, otherwise: str = "") -> str:
        """A text. `otherwise` if it is absent."""
        return self._typed(key, is_text) or otherwise

    def flag(self, key: str) -> bool:
        """True only for `true`."""
        return self.values.get(key) is True

    def part(self, key: str) -> Record:
        """An object. An empty one if it is absent."""
        return Record(self._typed(key, is_object) or {}, self._place(key), self.ignored)

    def parts(self) -> dict[str, Record]:
        """Every entry that is an object."""
        return {key: self.part(key) for key in self.values}

    def records(self, key: str) -> list[Record]:
        """A list of objects. An empty list if it is absent."""
        found = self._typed(key, lambda value: is_list(value, is_object)) or []
        return [Record(value, self._place(key), self.ignored) for value in found]

    def texts(self, key: str) -> list[str]:
        """A list of texts. An empty list if it is absent."""
        return self._typed(key, lambda value: is_list(value, is_text)) or []

    def numbers(self, key: str) -> list[float]:
        """A list of numbers. An empty list if it is absent."""
        return self._typed(key, lambda value: is_list(value, is_number)) or []

    def table(self, key: str, width: int) -> list[list[float]]:
        """Rows of `width` numbers each. An empty list if they are absent."""

        def is_row(row: object) -> bool:
            return is_list(row, is_number) and len(row) == width

        return self._typed(key, lambda value: is_list(value, is_row)) or []

    def _typed(self, key: str, is_right: Callable[[Any], bool]) -> Any:
        value = self.values.get(key)
        if value is None or is_right(value):
            return value
        if self._place(key) not in self.ignored:
            self.ignored.append(self._place(key))
        return None

    def _place(self, key: str) -> str:
        return f"{self.name} {key}".strip()


def is_number(value: object) -> bool:
    """True for a finite number. False for true and false of JSON, and for a number too large for a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def is_text(value: object) -> bool:
    """True for a text."""
    return isinstance(value, str)


def is_object(value: object) -> bool:
    """True for a JSON object."""
    return isinstance(value, dict)


def is_list(value: object, is_right: Callable[[Any], bool]) -> bool:
    """True for a JSON list whose entries all satisfy `is_right`."""
    return isinstance(value, list) and all(map(is_right, value))


def read_record(folder: Path, name: str) -> Record:
    """A result file of a run. An empty record if the file does not exist.

    Raises:
        MachineError: the file cannot be read, or is not a JSON object.
    """
    path = folder / name
    return Record(read_json_object(path) if path.is_file() else {}, name)


def as_text(value: object) -> str:
    """A JSON value on one line. Texts stay unchanged."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
