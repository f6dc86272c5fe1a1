"""Reads rows with any number of labels: as lists, texts with a delimiter, vectors, or one column per class.

Each form becomes one column of lists of class names. An empty list means none of the classes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from bert_glue.data.own.classes import LabelFlags, class_text, texts_of, without_dropped
from bert_glue.data.own.columns import names_in
from bert_glue.data.tables import Problems, Table
from bert_glue.errors import DataError
from bert_glue.storage.files import one_line
from bert_glue.tasks import MULTI_LABEL, SINGLE_LABEL

DELIMITER = ";"  # joins the labels of a row if neither the data nor a flag names another
_USUAL_DELIMITERS = (";", "|", ",")
_VECTOR_CELLS = (0, 1, "0", "1")
_OUTCOMES = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def join_labels(labels: Iterable[str], delimiter: str) -> str:
    r"""The labels of a row as one text. A backslash escapes each delimiter and backslash within a name."""
    return delimiter.join(name.replace("\\", "\\\\").replace(delimiter, f"\\{delimiter}") for name in labels)


def one_line_of(labels: Iterable[str], delimiter: str) -> str:
    """As `join_labels`, for a format without quoting: tabs and line ends are escaped too."""
    return delimiter.join(one_line(name).replace(delimiter, f"\\{delimiter}") for name in labels)


def part_labels(text: str, delimiter: str) -> list[str]:
    r"""The labels in a text that `join_labels` or a user wrote.

    White space around labels and empty labels are dropped. A backslash escapes only a backslash or the delimiter.
    """
    if "\\" not in text:
        return [part.strip() for part in text.split(delimiter) if part.strip()]
    parts, at = [""], 0
    while at < len(text):
        if text[at] == "\\" and text[at + 1 :].startswith(("\\", delimiter)):
            escaped = "\\" if text[at + 1] == "\\" else delimiter
            parts[-1] += escaped
            at += 1 + len(escaped)
        elif text.startswith(delimiter, at):
            parts.append("")
            at += len(delimiter)
        else:
            parts[-1] += text[at]
            at += 1
    return [part.strip() for part in parts if part.strip()]


def has_label_sets(table: Table, label: str, flags: LabelFlags) -> tuple[bool, list[str]]:
    """Whether the rows of training data may have several labels, and log lines.

    Lists decide it if one of them has several labels. Texts are never split without a flag.

    Raises:
        DataError: the answer is not certain. The error names the flags that settle it.
    """
    if label not in table.columns and flags.is_multi_label is False:
        raise DataError(
            f"{table.origin}: --label_column_name {label} names several columns, which needs --problem_type "
            f"{MULTI_LABEL}"
        )
    if flags.is_multi_label is not None or label not in table.columns:
        return flags.is_multi_label is not False, []
    values = table.column(label)
    _refuse_objects(table, label)
    lists = [value for value in values if isinstance(value, (list, tuple))]
    if not lists:
        if not flags.is_regression:
            _refuse_joined(table, label)
        return False, []
    sizes = [len(value) for value in lists]
    overruled = f"--problem_type {SINGLE_LABEL} overrules"
    if max(sizes) > 1:
        said = f"{table.origin}: labels are lists of up to {max(sizes)}, so rows may have several ({MULTI_LABEL})"
        return True, [f"{said}; {overruled}"]
    if 0 in sizes:
        raise DataError(
            f"{table.origin}: no label list has more than one item, and {sizes.count(0)} of {len(values)} are empty: "
            f"--problem_type {MULTI_LABEL} reads these as rows with none of the classes, "
            f'--problem_type {SINGLE_LABEL} --drop_rows "{label}=" leaves them out'
        )
    return False, [f"{table.origin}: labels are lists of one item; --problem_type {MULTI_LABEL} allows more"]


def _refuse_objects(table: Table, label: str) -> None:
    """Refuses labels that are JSON objects, such as `{"art": true, "news": false}`, or lists in lists."""
    for row, value in enumerate(table.column(label)):
        cells = value if isinstance(value, (list, tuple)) else [value]
        if found := next((one for one in cells if isinstance(one, (dict, list, tuple))), None):
            kind = "an object" if isinstance(found, dict) else "a list in a list"
            raise DataError(
                f"{table.where(row)}: label {str(found)[:60]!r} is {kind}: a name is needed, or a list of names, or "
                "a column of 0 and 1 for each class"
            )


def _refuse_joined(table: Table, label: str) -> None:
    """Refuses texts that look like several labels, if no flag says how to read them."""
    texts = {value for value in table.column(label) if isinstance(value, str)}
    both = f"--problem_type {SINGLE_LABEL} makes each text one class"
    if written := next((text for text in texts if len(_written_list(text) or ()) > 1), None):
        raise DataError(
            f"{table.origin}: label {written[:60]!r} looks like a list: --problem_type {MULTI_LABEL} reads its labels, "
            f"{both}"
        )
    for delimiter in (*_USUAL_DELIMITERS, " "):
        joined = [text for text in texts if len(part_labels(text, delimiter)) > 1]
        parts = {part for text in texts for part in part_labels(text, delimiter)}
        # Several labels share few parts among many texts. A comma in numbers may be decimal, and names have spaces.
        are_numbers = all(part.strip("+-").isdecimal() for part in parts)
        is_plain = (delimiter == "," and are_numbers) or (delimiter == " " and not are_numbers)
        if joined and len(parts) < len(texts) and not is_plain:
            raise DataError(
                f"{table.origin}: {len(texts)} different labels, such as {min(joined)[:60]!r}, consist of only "
                f'{len(parts)} parts: --label_delimiter "{delimiter}" makes each part a label; {both}'
            )


def labelled_sets(
    table: Table, label: str, flags: LabelFlags, delimiter: str | None = None, known: tuple[str, ...] = ()
) -> tuple[Table, list[str]]:
    """The rows to train or to score on, each with a list of labels as texts (None: unlabelled), and log lines.

    Args:
        label: one column, or several columns of 0 and 1, separated by commas.
        delimiter: separates the labels in a text.
        known: the classes of a finished model. A text that equals one of them is one label.

    Raises:
        DataError: rows have labels that cannot be used, and `--drop_rows` does not mention them (file:line).
    """
    table, notes = without_dropped(table, label, flags)
    if label not in table.columns:
        table = _merged(table, label)
    else:
        given = table.column(label)
        has_lists = any(isinstance(value, (list, tuple)) for value in given)
        values = [_as_list(table, row, value, delimiter, known, has_lists) for row, value in enumerate(given)]
        table = replace(table, columns={**table.columns, label: values})
        _refuse_fractions(table, label)
        if _are_vectors(table, label):
            table, notes = _positions(table, label), [*notes, f"{table.origin}: labels are vectors of 0 and 1"]
    table = _named(table, label, flags)
    none = sum(value == [] for value in table.column(label))
    notes += [f"{table.origin}: {none} of {len(table)} rows have none of the classes"] if none else []
    return table, notes


def _as_list(
    table: Table, row: int, value: Any, delimiter: str | None, known: tuple[str, ...], has_lists: bool
) -> list | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str):
        return [value]
    if delimiter is not None:
        return part_labels(value, delimiter)
    if value in known or not value.strip():
        return [value] if value.strip() else []
    written = _written_list(value)
    if written is None and has_lists and not any(sign in value for sign in _USUAL_DELIMITERS):
        return [value]  # in a column with lists, a plain text is a single label
    if written is None:
        raise DataError(
            f"{table.where(row)}: label {value[:60]!r} may hold several labels; name their separator with "
            f'--label_delimiter, such as "{DELIMITER}"'
        )
    return written


def _refuse_fractions(table: Table, label: str) -> None:
    """Refuses lists of probabilities or scores, which would otherwise be taken for names of classes."""
    for row, value in enumerate(table.column(label)):
        if found := [one for one in value or () if isinstance(one, float) and not one.is_integer()]:
            raise DataError(
                f"{table.where(row)}: label {found[0]!r} in a list has a fraction; lists of probabilities or scores "
                "are not supported, so list the classes of each row"
            )


def _written_list(text: str) -> list | None:
    """The list that a text spells as JSON or Python would. None for any other text.

    The list may be under one key, as Label Studio exports several choices: `{"choices": ["art", "news"]}`.
    """
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if isinstance(found, dict) and len(found) == 1:
        found = next(iter(found.values()))
    return found if isinstance(found, list) and all(isinstance(one, (str, int, float)) for one in found) else None


def _merged(table: Table, label: str) -> Table:
    """Merges columns of 0 and 1 into one column of lists. The classes are the columns, in the given order."""
    names, problems = names_in(label), Problems(table.origin)
    found: list[list[int]] = [[] for _ in range(len(table))]
    for number, name in enumerate(names):
        for row, value in enumerate(table.column(name)):
            outcome = _OUTCOMES.get((class_text(value) or "").casefold())
            if outcome is None:
                problems.add(
                    table.where(row),
                    f"column {name!r} is {value!r}, not 0 or 1; "
                    f'--drop_rows "{name}={class_text(value) or ""}" leaves such rows out',
                )
            elif outcome:
                found[row].append(number)
    problems.raise_any()
    return replace(table, columns={**table.columns, label: found}, class_names={**table.class_names, label: names})


def _are_vectors(table: Table, label: str) -> bool:
    """Whether the rows are vectors of 0 and 1 of one length. A list of classes never repeats an item; a vector does."""
    rows = [value for value in table.column(label) if value is not None]
    if label in table.class_names or not rows or len(rows[0]) < 2:
        return False
    if not all(len(row) == len(rows[0]) and all(one in _VECTOR_CELLS for one in row) for row in rows):
        return False
    return any(len(set(map(str, row))) < len(row) for row in rows) or type(rows[0][0]) is not str


def _positions(table: Table, label: str) -> Table:
    rows = [None if row is None else [at for at, v in enumerate(row) if v in (1, "1")] for row in table.column(label)]
    size = max(len(row) for row in table.column(label) if row is not None)
    names = {**table.class_names, label: tuple(map(str, range(size)))}
    return replace(table, columns={**table.columns, label: rows}, class_names=names)


def _named(table: Table, label: str, flags: LabelFlags) -> Table:
    """Replaces class numbers by names, applies `--label_map`, and removes repeated labels from each row."""
    names, found = table.class_names.get(label), []
    for row, value in enumerate(table.column(label)):
        if names is not None and value is not None:
            value = [names[one] if type(one) is int and 0 <= one < len(names) else one for one in value]
        texts = [] if value is None else texts_of(value)
        if None in texts:
            raise DataError(f"{table.where(row)}: label {value[texts.index(None)]!r} in a list cannot be a class")
        found.append(None if value is None else list(dict.fromkeys(flags.translated.get(t, t) for t in texts)))
    classes = dict(table.class_names)
    if names is not None:
        classes[label] = tuple(dict.fromkeys(flags.translated.get(name, name) for name in names))
    return replace(table, columns={**table.columns, label: found}, class_names=classes)
