"""Turns the columns of a table into the texts and labels of one split of a task.

Only this module turns the columns of a table into labels. Every source (hub, folder, file) therefore follows the same
rules, and no wrong label reaches training.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from bert_glue.data.own.classes import (
    LabelFlags,
    as_number,
    class_text,
    classes_of,
    labelled_rows,
    texts_of,
    translated,
)
from bert_glue.data.own.columns import ColumnFlags, check_quoting, choose_columns
from bert_glue.data.own.label_sets import has_label_sets, labelled_sets
from bert_glue.data.own.vocabulary import ClassVocabulary
from bert_glue.data.tables import Problems, Table, pieces
from bert_glue.errors import DataError, UsageError
from bert_glue.tasks import MULTI_LABEL, REGRESSION, SINGLE_LABEL, GlueTask, own_task

LABEL = "label"
_EMPTY = (None, "", [])
_MINUS_ONE = (-1, "-1", "-1.0")


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Args:
        name: the split name in the task table, e.g. "validation_matched".
        texts: one or two columns of equal length. Every value is a str, which may be empty.
        labels: class ids in the order of `task.labels` (a tuple per row of a multi-label task), or scores. None if
            unlabelled.
        origin: the source, for messages: a file path, a hub data set and its revision, or "sample data, not GLUE".
    """

    name: str
    texts: tuple[list[str], ...]
    labels: list[int] | list[float] | list[tuple[int, ...]] | None
    origin: str

    def __len__(self) -> int:
        return len(self.texts[0])

    def take(self, n: int) -> Split:
        """The first `n` rows, or all rows if there are fewer."""
        return self.rows(range(min(n, len(self))))

    def rows(self, rows: Iterable[int]) -> Split:
        """The rows with these 0-based numbers, in the given order."""
        rows = list(rows)
        labels: Any = None if self.labels is None else [self.labels[row] for row in rows]
        return Split(self.name, tuple([column[row] for row in rows] for column in self.texts), labels, self.origin)


def make_split(task: GlueTask, name: str, table: Table, is_labelled: bool) -> Split:
    """Builds a split from a table, and checks its columns and labels.

    Args:
        table: has the columns `task.columns` and, if labelled, `task.label_column`.
        is_labelled: True if every row must have a label. False: labels are not read.

    Raises:
        DataError: a column is missing, a value is not a text, or a label is wrong or missing. The error lists the
            first five such rows.
    """
    problems = Problems(table.origin)
    texts = tuple(table.column(column) for column in task.columns)
    for column, values in zip(task.columns, texts, strict=True):
        _check_texts(table, column, values, problems)
    readers = {REGRESSION: _scores, MULTI_LABEL: _class_sets, SINGLE_LABEL: _classes}
    labels: Any = None
    if is_labelled:
        labels = readers[task.problem_type](task, table, table.column(task.label_column), problems)
    problems.raise_any()
    if task.text_delimiter is not None:
        texts = ([task.text_delimiter.join(row) for row in zip(*texts, strict=True)],)
    return Split(name, texts, labels, table.origin)


def join_splits(splits: list[Split]) -> Split:
    """Joins splits in the given order. Either all of them are labelled, or none."""
    if len(splits) == 1:
        return splits[0]
    columns = zip(*(split.texts for split in splits), strict=True)
    texts = tuple(list(chain(*parts)) for parts in columns)
    labels = None if splits[0].labels is None else list(chain(*(split.labels for split in splits)))
    return Split(splits[0].name, texts, labels, f"{splits[0].origin} and {len(splits) - 1} more")


def _check_texts(table: Table, column: str, values: list, problems: Problems) -> None:
    if all(type(value) is str for value in values) and all(_is_encodable("".join(part)) for part in pieces(values)):
        return  # the fast path: nearly all columns are valid, and these two checks loop in C
    for row, value in enumerate(values):
        if value is None:
            problems.add(table.where(row), f"column {column!r} has no text (missing or null)")
        elif not isinstance(value, str):
            problems.add(table.where(row), f"column {column!r} is {_shown(value)}, not text")
        elif not _is_encodable(value):
            problems.add(table.where(row), f"column {column!r} has half a surrogate pair, which UTF-8 cannot hold")


def _is_encodable(text: str) -> bool:
    # JSON can hold \ud800, half of a surrogate pair, which no tokenizer accepts.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_names(table: Table, label: str, classes: tuple[str, ...]) -> None:
    """Raises DataError if the name of a class cannot be encoded. It names the first such row, or else the file."""
    broken = next((name for name in classes if not _is_encodable(name)), None)
    if broken is not None:
        row = next((row for row, value in enumerate(table.column(label)) if broken in texts_of(value)), None)
        where = table.origin if row is None else table.where(row)
        raise DataError(f"{where}: the class name {broken!r} has half a surrogate pair, which UTF-8 cannot hold")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:40]}{'...' if len(text) > 40 else ''} ({type(value).__name__})"


def _is_unlabelled(task: GlueTask, value: Any) -> bool:
    """True for a missing value, and for -1 unless that is a class of the task."""
    if isinstance(value, (list, dict)):
        return False
    return value in _EMPTY or (value in _MINUS_ONE and "-1" not in task.labels)


def _ids_by_label(task: GlueTask, table: Table) -> dict[Any, int]:
    """Each accepted value of the label column -> its class id in the order of `task.labels`."""
    by_name: dict[Any, int] = {name: at for at, name in enumerate(task.labels)}
    if task.is_official:
        # Numbers refer to the class order of GLUE. Classes of own data are matched by their text only.
        for at in range(len(task.labels)):
            by_name |= {at: at, str(at): at, f"{at}.0": at}
    names = table.class_names.get(task.label_column)
    if names is None:
        return by_name
    own = {name: at for at, name in enumerate(task.labels)}
    folded = {name.casefold(): at for name, at in own.items()}
    if any(name not in own and name.casefold() not in folded for name in names):
        raise DataError(
            f"{table.origin}: the label names {', '.join(map(repr, names))} do not match the task; "
            f"expected: {', '.join(task.labels)}"
        )
    # The data set has its own numbers for its classes, so they are matched by name.
    return {at: own.get(name, folded.get(name.casefold())) for at, name in enumerate(names)}


def _classes(task: GlueTask, table: Table, raw: list, problems: Problems) -> list[int]:
    ids = _ids_by_label(task, table)
    choices = ", ".join(task.labels)
    if task.is_official:
        expected = f"is not one of: {choices} or 0-{len(task.labels) - 1}"
    else:
        expected = f"is not one of the training labels: {choices}"
    has_own_ids = task.is_official or task.label_column in table.class_names
    labels = []
    for row, value in enumerate(raw):
        key = value if has_own_ids else class_text(value)
        # A bool is an int in Python, so True would be read as class 1.
        found = None if isinstance(key, (bool, list, dict)) else ids.get(key)
        if found is None:
            problems.add(table.where(row), _label_problem(task, value, expected))
        else:
            labels.append(found)
    return labels


def _class_sets(task: GlueTask, table: Table, raw: list, problems: Problems) -> list[tuple[int, ...]]:
    ids = {name: at for at, name in enumerate(task.labels)}
    labels = []
    for row, value in enumerate(raw):
        if value is None:
            problems.add(table.where(row), _label_problem(task, None, ""))
        elif unknown := [name for name in value if name not in ids]:
            expected = f"is not one of the training labels: {', '.join(task.labels)}"
            problems.add(table.where(row), _label_problem(task, unknown[0], expected))
        else:
            labels.append(tuple(sorted(ids[name] for name in value)))
    return labels


def _scores(task: GlueTask, table: Table, raw: list, problems: Problems) -> list[float]:
    low, high = task.score_range or (-math.inf, math.inf)
    labels = []
    for row, value in enumerate(raw):
        score = as_number(value)
        if score is None or not math.isfinite(score):
            problems.add(table.where(row), _label_problem(task, value, "is not a finite number"))
        elif not low <= score <= high:
            problems.add(table.where(row), _label_problem(task, value, f"is not in [{low:g}, {high:g}]"))
        else:
            labels.append(score)
    return labels


def _label_problem(task: GlueTask, value: Any, text: str) -> str:
    way_out = ""
    if not task.is_official:
        own_value = "" if value in _EMPTY else value
        way_out = f'; --drop_rows "{task.label_column}={own_value}" leaves such rows out'
    if value in _EMPTY:
        return f"no label, but this split must be labelled{way_out}"
    if _is_unlabelled(task, value):
        return f"label {value!r} means unlabelled, but this split must be labelled{way_out}"
    shown = repr(value[:40]) if isinstance(value, str) else _shown(value)
    return f"label {shown} {text}"


def fit_splits(task: GlueTask, available: set[str]) -> tuple[GlueTask, dict[str, str]]:
    """Restricts a GLUE task to the parts that the data has. Also returns split -> part.

    If the task has several evaluation splits and the data has a single `validation`, it becomes the first of them.
    """
    parts = {split: split for split in task.splits}
    if not {split for split, _, _ in task.evaluation} & available:
        task = replace(task, evaluation=task.evaluation[:1])
        parts[task.evaluation[0][0]] = "validation"
    if not {split for split, _ in task.test} & available:
        task = replace(task, test=task.test[:1])
        parts[task.test[0][0]] = "test"
    # Published scores and the leaderboard refer to the rows of GLUE, not to own data.
    return replace(task, published=(), leaderboard=None), parts


@dataclass
class OwnData:
    """Reads the tables of own data as the splits of a task.

    Args:
        read: part -> its table; raises if the part does not exist.
        columns: the flags about columns.
        labels: the flags about labels and rows.
        delimiter: joins several text columns into one text. None if `--text_column_delimiter` is not given.
        notes: receives log lines.
    """

    read: Callable[[str], Table]
    columns: ColumnFlags
    labels: LabelFlags
    delimiter: str | None = None
    notes: list[str] = field(default_factory=list)

    def describe(self, part: str, name: str) -> GlueTask:
        """The task of own data, as its training part describes it.

        Raises:
            DataError: the columns are not certain, there is no label column, or only one label.
        """
        table = self.read(part)
        columns = choose_columns(table, self.columns, True)
        self.notes += columns.lines(table)
        has_sets, notes = has_label_sets(table, columns.label, self.labels)
        self.notes += notes
        # The notes about rows are dropped here, because `split` repeats them.
        if has_sets:
            kept, _ = labelled_sets(table, columns.label, self.labels, self.labels.delimiter)
        else:
            kept, _ = labelled_rows(table, columns.label, self.labels)
        classes, notes = classes_of(kept, columns.label, self.labels, has_sets)
        self.notes += notes
        _check_names(kept, columns.label, classes)
        task = self._task(_plain(name), columns.texts, columns.label, classes, has_sets)
        return replace(task, label_delimiter=self.labels.delimiter)

    def of_model(self, finished: GlueTask, part: str, is_labelled: bool, name: str) -> GlueTask:
        """The task of own data for a finished model, which defines the classes.

        Args:
            finished: the task that the model was trained on. Its columns are used unless the flags name others.
            part: the part whose table decides the columns.
            name: the name of the task.

        Raises:
            DataError: the columns are not certain, or the model reads another number of them.
        """
        table = self.read(part)
        _check_kind(finished, self.labels)
        flags = self._with_class_columns(finished, table) if is_labelled else self.columns
        columns = choose_columns(table, flags, is_labelled, finished.columns)
        self.notes += columns.lines(table)
        delimiter = self.delimiter if self.delimiter is not None else finished.text_delimiter
        if finished.columns and delimiter is None and len(columns.texts) != len(finished.columns):
            raise DataError(
                f"{table.origin}: the model reads {len(finished.columns)} texts per row ({', '.join(finished.columns)})"
                f", not {len(columns.texts)} ({', '.join(columns.texts)}); choose with --text_column_names"
            )
        task = self._task(_plain(name), columns.texts, columns.label, finished.labels, finished.is_multi_label)
        task = replace(task, label_delimiter=self.labels.delimiter or finished.label_delimiter)
        return replace(task, text_delimiter=delimiter) if delimiter is not None else task

    def _with_class_columns(self, finished: GlueTask, table: Table) -> ColumnFlags:
        """The column flags. If the file has no label column but one column per class, these become the labels."""
        names = [str(name).strip().lower() for name in table.columns]
        is_free = self.columns.label is None and not {"label", "labels"} & set(names)
        if finished.is_multi_label and is_free and set(finished.labels) <= set(table.columns):
            return replace(self.columns, label=",".join(finished.labels))
        return self.columns

    def _task(
        self, name: str, texts: tuple[str, ...], label: str | None, classes: tuple[str, ...], has_sets: bool
    ) -> GlueTask:
        delimiter = self.delimiter
        if len(texts) > 2 and delimiter is None:
            delimiter = " "
            self.notes.append(f"{len(texts)} text columns are joined by a space (see --text_column_delimiter)")
        task = own_task(name, texts, classes, has_sets)
        return replace(task, label_column=label or LABEL, text_delimiter=delimiter)

    def split(self, task: GlueTask, name: str, part: str, is_labelled: bool, owner: ClassVocabulary | None) -> Split:
        """Reads one split, and matches its labels to the classes of `owner` (None for scores).

        Raises:
            DataError: as in `make_split`, or a label is not a class of `owner`.
        """
        table = self.read(part)
        self.notes += table.notes
        check_quoting(table, task.columns)
        if not is_labelled:
            return make_split(task, name, table, False)
        if task.is_multi_label:
            known = () if owner is None else owner.names
            table, notes = labelled_sets(table, task.label_column, self.labels, task.label_delimiter, known)
        else:
            table, notes = labelled_rows(table, task.label_column, self.labels)
        names: dict[str, str] = {}
        if owner is not None:
            names, told = owner.match(table, task.label_column)
            notes += told
        self.notes += [note for note in notes if note not in self.notes]
        return make_split(task, name, translated(table, task.label_column, names), True)


def _check_kind(finished: GlueTask, flags: LabelFlags) -> None:
    """Raises UsageError if a flag names another problem type than that of the finished model."""
    kinds = {None: None, True: MULTI_LABEL, False: SINGLE_LABEL}
    asked = REGRESSION if flags.is_regression else kinds[flags.is_multi_label]
    if asked not in (None, finished.problem_type):
        raise UsageError(
            f"the model has problem_type {finished.problem_type}, but the flags ask for {asked}; leave out "
            "--problem_type, --do_regression and --label_delimiter, or give matching ones"
        )


def _plain(name: str) -> str:
    """The name with every character that is unsafe in a file name replaced."""
    return re.sub(r"[^\w.-]", "_", name)


def parted(split: Split, percentage: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits rows at random into training and validation, with the same share of each class (for scores: of all rows).

    A class with a single row stays in training.

    Args:
        percentage: the share of rows for validation, in (0, 100).

    Raises:
        DataError: no row would go to validation.
    """
    generator = np.random.default_rng(seed)
    by_class: dict[Any, list[int]] = {}
    counts = Counter(one for label in split.labels or [] if isinstance(label, tuple) for one in label)
    for row, label in enumerate(split.labels or []):
        if isinstance(label, tuple):  # a row with several labels counts for its rarest class
            label = min(label, key=lambda one: (counts[one], one), default=None)
        by_class.setdefault(label if isinstance(label, int) else None, []).append(row)
    chosen: list[int] = []
    owed = 0.0  # the rounding error is carried over to the next class
    for _, rows in sorted(by_class.items(), key=lambda item: (len(item[1]), str(item[0]))):
        owed += len(rows) * percentage / 100
        count = min(round(owed), len(rows) - 1)
        owed -= count
        chosen += generator.permutation(rows)[:count].tolist()
    if not chosen:
        raise DataError(
            f"{split.origin}: --validation_split_percentage {percentage:g} of {len(split)} rows holds out no row"
        )
    held_out = set(chosen)
    return [row for row in range(len(split)) if row not in held_out], sorted(chosen)
