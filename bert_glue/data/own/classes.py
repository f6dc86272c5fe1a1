"""The classes that training data has, and the labels of a file as text: rows to leave out, numbers, lists of one."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from bert_glue.config.arguments import Arguments
from bert_glue.data.own.columns import names_in, unescaped
from bert_glue.data.tables import Table
from bert_glue.errors import DataError, UsageError
from bert_glue.tasks import MULTI_LABEL, REGRESSION

# Python's float() also reads 1_1, inf and nan, which are names here.
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_STATES = {"accept", "accepted", "approved", "submitted", "reject", "rejected", "ignore", "ignored", "skip", "skipped",
           "discarded", "cancelled", "canceled", "pending", "draft", "completed"}  # fmt: skip
_UNUSABLE = _STATES - {"accept", "accepted", "approved", "submitted", "completed"}
_FLAGGED = re.compile(r"(was_|is_)?(rejected|cancell?ed|skipped|ignored|discarded|deleted|ground_truth_missing)")
MOST_SHOWN = 20


@dataclass(frozen=True)
class LabelFlags:
    """The flags about labels and rows.

    Args:
        translated: text in the label column -> the class that it stands for (`--label_map`).
        dropped: column -> values whose rows are dropped. None if `--drop_rows` is not given.
        is_regression: whether labels are scores. None: the labels decide.
        is_multi_label: whether a row may have several labels. None: the labels decide.
        delimiter: separates the labels in a text.
    """

    translated: dict[str, str]
    dropped: dict[str, tuple[str, ...]] | None = None
    is_regression: bool | None = None
    is_multi_label: bool | None = None
    delimiter: str | None = None

    @classmethod
    def of(cls, args: Arguments) -> LabelFlags:
        """The flags of a run.

        Raises:
            UsageError: a part has no "=".
        """
        translated = dict(_halves("label_map", part) for part in names_in(args.label_map))
        dropped: dict[str, tuple[str, ...]] = {}
        for part in names_in(args.drop_rows):
            if part != "nothing":
                column, value = _halves("drop_rows", part)
                dropped[column] = (*dropped.get(column, ()), value)
        is_regression, is_multi_label = args.do_regression, None
        delimiter = None if args.label_delimiter is None else unescaped(args.label_delimiter)
        if args.problem_type is not None:
            is_regression, is_multi_label = args.problem_type == REGRESSION, args.problem_type == MULTI_LABEL
        elif delimiter is not None or is_regression:
            is_multi_label = delimiter is not None
        said = None if args.drop_rows is None else dropped
        return cls(translated, said, is_regression, is_multi_label, delimiter)


def _halves(flag: str, part: str) -> tuple[str, str]:
    name, equals, value = part.partition("=")
    if not equals or not name:
        raise UsageError(f"--{flag} {part}: expected NAME=VALUE")
    return name, value


def shown(names: Iterable[str]) -> str:
    """The names in quotes, at most twenty of them."""
    names = list(names)
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(map(repr, names[:MOST_SHOWN])) + more


def labelled_rows(table: Table, label: str, flags: LabelFlags) -> tuple[Table, list[str]]:
    """The rows to train or to score on, each with one label (a text or a number), and log lines.

    A list of one label becomes that label. If the file names its classes, numbers become names.

    Raises:
        DataError: rows have labels that cannot be used, and `--drop_rows` does not mention them.
    """
    names = table.class_names.get(label)
    values = [_single(value) for value in table.column(label)]
    for row, value in enumerate(values):
        if isinstance(value, list) and len(value) > 1:
            raise DataError(
                f"{table.where(row)}: the label is a list of {len(value)}, and each row needs one label; "
                f"--problem_type {MULTI_LABEL} allows several"
            )
    if names is not None:
        values = [names[v] if type(v) is int and 0 <= v < len(names) else v for v in values]
    values = [flags.translated.get(class_text(value) or "", value) for value in values]
    table = replace(table, columns={**table.columns, label: values})
    kept, notes = without_dropped(table, label, flags)
    if any(isinstance(value, list) for value in table.column(label)):
        notes.append(f"{table.origin}: each label is a list with one item; the item is used")
    return kept, notes


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _whole_text(value: Any) -> str | None:
    """The text with which `--drop_rows` compares a value: "" for an empty value, None for a list of several."""
    return None if isinstance(value, (list, tuple)) and len(value) > 1 else class_text(_single(value)) or ""


def without_dropped(table: Table, label: str, flags: LabelFlags) -> tuple[Table, list[str]]:
    """The table without the rows that `--drop_rows` names, and log lines with their counts."""
    if flags.dropped is None:
        _refuse_unusable(table, label)
        return table, []
    notes, keep = [], [True] * len(table)
    for column, values in flags.dropped.items():
        texts = [_whole_text(value) for value in table.column(column)]
        for value in values:
            rows = [at for at, text in enumerate(texts) if text == value]
            notes.append(f"{table.origin}: {len(rows)} rows with {column!r} = {value!r} are left out")
            for at in rows:
                keep[at] = False
    rows = [at for at, is_kept in enumerate(keep) if is_kept]
    if not rows:
        raise DataError(f"{table.origin}: --drop_rows drops all {len(table)} rows")
    return table.take(rows), notes


def _refuse_unusable(table: Table, label: str) -> None:
    """Refuses rows without a majority label, and rows that an annotation tool has marked as rejected or skipped."""
    counts = Counter(value for value in table.columns.get(label, ()) if isinstance(value, str))
    if counts["-"] and any(re.search(r"\w\w", value) for value in counts):
        raise DataError(
            f"{table.origin}: {counts['-']} of {len(table)} rows have the label '-', which means no majority in SNLI "
            f"and similar data; --drop_rows \"{label}=-\" leaves them out, --drop_rows nothing makes '-' a class"
        )
    for column, values in table.columns.items():
        states = Counter(text for text in map(class_text, map(_single, values)) if text)
        marked = set(states) & (_UNUSABLE if set(map(str.lower, states)) <= _STATES else set())
        marked |= {state for state in states if state.lower() in _UNUSABLE} if marked else set()
        if _FLAGGED.fullmatch(str(column).lower()):
            marked = {state for state in states if state.lower() in ("true", "1", "yes")}
        if marked and column != label:
            given = ",".join(f"{column}={state}" for state in sorted(marked))
            # Prodigy's binary answers: every row has the same label, and `answer` says whether it is true.
            is_answer = len(distinct_labels(table, label)) == 1 if label in table.columns else False
            meant = f"; if it is the label: --label_column_name {column} --drop_rows nothing" if is_answer else ""
            raise DataError(
                f"{table.origin}: column {column!r} is {shown(sorted(marked))} in "
                f'{sum(states[state] for state in marked)} of {len(table)} rows; --drop_rows "{given}" leaves them '
                f"out, --drop_rows nothing keeps them{meant}"
            )


def translated(table: Table, label: str, names: dict[str, str]) -> Table:
    """The table with its labels replaced by the names of their classes. Labels that are not in `names` stay."""

    def one(value: Any) -> Any:
        return [one(own) for own in value] if isinstance(value, list) else names.get(class_text(value) or "", value)

    return replace(table, columns={**table.columns, label: list(map(one, table.column(label)))}, class_names={})


def distinct_labels(table: Table, label: str) -> list[str]:
    """The different labels of a column as texts, in order of appearance."""
    texts = (text for value in table.column(label) for text in texts_of(value))
    return list(dict.fromkeys(text for text in texts if text is not None))


def texts_of(value: Any) -> list[str | None]:
    """The labels of a row as texts: a single one, or those of a list."""
    return [class_text(one) for one in value] if isinstance(value, (list, tuple)) else [class_text(value)]


def class_text(value: Any) -> str | None:
    """A label as text: "1" for 1, 1.0 and "1"; "true" for True. None if the value cannot be a class."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, (str, int)) and value != "" else None


def as_number(value: Any) -> float | None:
    """A number, or a text with a decimal number, as float. None for any other value."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return None
    try:
        # Stripped first: a separator such as \x1f counts as space for `\s` and for strip, but not for float.
        return float(value.strip() if isinstance(value, str) else value)
    except OverflowError:
        return None


def sorted_labels(values: Collection[str]) -> tuple[str, ...]:
    """Distinct label texts in class order: numbers by value (9 before 10), texts by letter."""
    distinct = set(values)
    if all(re.fullmatch(r"-?\d+", value) for value in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))


def classes_of(
    table: Table, label: str, flags: LabelFlags, has_sets: bool = False
) -> tuple[tuple[str, ...], list[str]]:
    """The classes of training data (() for scores), and log lines.

    Numbers with a fraction are scores, and other labels are classes. `--do_regression` overrules this.

    Args:
        has_sets: each row has a list of labels.

    Raises:
        DataError: there are fewer than two classes, all rows have the same labels, or numbers may be either.
    """
    values = table.column(label)
    if has_sets:
        return _classes_of_sets(table, label)
    if flags.is_regression is None and label not in table.class_names:
        is_regression, notes = _are_scores(table, label)
    else:
        is_regression, notes = bool(flags.is_regression), []
    if is_regression:
        return (), notes
    if label in table.class_names:
        return table.class_names[label], notes
    texts = {text for text in map(class_text, values) if text is not None}
    if len(texts) < 2:
        only = f"all labels are {texts.pop()!r}" if texts else "there are no labels"
        raise DataError(f"{table.origin}: {only}; training needs at least two different labels")
    return sorted_labels(texts), [*notes, *_alike(table, values), *_single_rows(table, texts)]


def _single_rows(table: Table, texts: set[str]) -> list[str]:
    """A warning if most labels occur in one row only, so that they may identify rows."""
    if len(texts) <= MOST_SHOWN or 2 * len(texts) <= len(table):
        return []
    return [
        f"warning: {table.origin}: {len(texts)} classes for {len(table)} rows, most with one row; if these are not the "
        "labels, name the label column with --label_column_name"
    ]


def _classes_of_sets(table: Table, label: str) -> tuple[tuple[str, ...], list[str]]:
    sets = [value for value in table.column(label) if value is not None]
    if len({frozenset(value) for value in sets}) < 2:
        only = f"all labels are {sets[0]}" if any(sets) else "there are no labels"
        raise DataError(f"{table.origin}: {only}; training needs rows with different labels")
    names = [name for value in sets for name in value]
    classes = table.class_names.get(label) or sorted_labels(set(names))
    absent = sorted(set(classes) - set(names))
    notes = [f"warning: {table.origin}: no row has {shown(absent)}"] if absent else []
    return classes, notes + _alike(table, names)


def _are_scores(table: Table, label: str) -> tuple[bool, list[str]]:
    values = table.column(label)
    numbers = [number for number in map(as_number, values) if number is not None]
    fractions = [number for number in numbers if not float(number).is_integer()]
    # More than half of the labels is enough: one typing error must not turn 5,000 scores into 5,000 classes.
    if fractions and 2 * len(numbers) > len(values):
        return True, [f"the labels are scores ({fractions[0]:g} is one); --do_regression false makes them classes"]
    for row, value in enumerate(values):
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+,\d+\s*", value):
            raise DataError(
                f"{table.where(row)}: label {value!r} has a comma. Write numbers with a decimal point; if the comma "
                'separates labels, give --label_delimiter ","'
            )
    row = next((row for row, value in enumerate(values) if _is_pointed(value)), None)
    if row is not None and len(numbers) == len(values):
        raise DataError(
            f"{table.where(row)}: labels such as {values[row]!r} are whole numbers with a decimal point; give "
            "--do_regression true if they are scores, or --do_regression false if they are classes"
        )
    return False, []


def _is_pointed(value: Any) -> bool:
    """True for a float and for a text such as 3.0."""
    if isinstance(value, str):
        return re.fullmatch(r"\s*[+-]?\d+\.0*\s*", value) is not None
    return isinstance(value, float)


def _alike(table: Table, values: list) -> list[str]:
    """Warnings about classes whose names differ only in case or white space."""
    counts = Counter(text for text in map(class_text, values) if text is not None)
    by_form: dict[str, list[str]] = {}
    for text in counts:
        by_form.setdefault(" ".join(text.casefold().split()), []).append(text)
    warnings = []
    for texts in by_form.values():
        if len(texts) > 1:
            shown_texts = " and ".join(f"{text!r} ({counts[text]} rows)" for text in sorted(texts))
            warnings.append(
                f"warning: {table.origin}: labels {shown_texts} differ only in case or white space, "
                f"but count as {len(texts)} classes; --label_map can merge them"
            )
    return warnings
