"""One split of a task as plain lists, and how the columns of a user's own data become texts and labels.

The only place that turns a table's columns into labels, so that every source (hub, folder, file)
is held to the same rules and no wrong label reaches training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from bert_glue.data.tables import Problems, Table, pieces
from bert_glue.errors import DataError
from bert_glue.tasks import GlueTask, own_task

LABEL = "label"
_ABSENT = (None, "")
_MINUS_ONE = (-1, "-1", "-1.0")


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Args:
        name: as in the task's table row, e.g. "validation_matched".
        texts: one or two columns of equal length; every value is a str, maybe an empty one.
        labels: class ids in the order of `task.labels`, or scores; None where unlabelled.
        origin: human text: a file path, a hub data set and its revision, or "sample data, not GLUE".
    """

    name: str
    texts: tuple[list[str], ...]
    labels: list[int] | list[float] | None
    origin: str

    def __len__(self) -> int:
        return len(self.texts[0])

    def take(self, n: int) -> Split:
        """The first `n` rows, or all if there are fewer."""
        labels = None if self.labels is None else self.labels[:n]
        return Split(self.name, tuple(column[:n] for column in self.texts), labels, self.origin)


def make_split(task: GlueTask, name: str, table: Table, is_labelled: bool) -> Split:
    """Checks a table's columns and labels.

    Args:
        table: has the columns `task.columns` and, where labelled, `label`.
        is_labelled: every row must have a label; otherwise all or none must (-1 counts as none).

    Raises:
        DataError: a missing column, text that is not text, a wrong or missing label; first five rows.
    """
    problems = Problems(table.origin)
    texts = tuple(table.column(column) for column in task.columns)
    for column, values in zip(task.columns, texts, strict=True):
        _check_texts(table, column, values, problems)
    labels: Any = None
    if is_labelled or LABEL in table.columns:
        raw = table.column(LABEL)
        if is_labelled or not all(_is_unlabelled(task, value) for value in raw):
            labels = _scores(task, table, raw, problems) if task.is_regression else _classes(task, table, raw, problems)
    problems.raise_any()
    return Split(name, texts, labels, table.origin)


def join_splits(splits: list[Split]) -> Split:
    """One split of several files, in the order given.

    Raises:
        DataError: some files are labelled and others are not.
    """
    if len(splits) == 1:
        return splits[0]
    unlabelled = [split.origin for split in splits if split.labels is None]
    if unlabelled and len(unlabelled) < len(splits):
        raise DataError(f"{unlabelled[0]}: has no labels, but other files of this split have")
    texts = tuple(list(chain(*columns)) for columns in zip(*(split.texts for split in splits), strict=True))
    labels = None if unlabelled else list(chain(*(split.labels for split in splits)))
    return Split(splits[0].name, texts, labels, f"{splits[0].origin} and {len(splits) - 1} more")


def _check_texts(table: Table, column: str, values: list, problems: Problems) -> None:
    if all(type(value) is str for value in values) and all(_is_encodable("".join(part)) for part in pieces(values)):
        return  # the fast path: C loops over what are nearly always sound columns
    for row, value in enumerate(values):
        if value is None:
            problems.add(table.where(row), f"column {column!r} has no text (missing or null)")
        elif not isinstance(value, str):
            problems.add(table.where(row), f"column {column!r} is {_shown(value)}, not text")
        elif not _is_encodable(value):
            problems.add(table.where(row), f"column {column!r} has half a surrogate pair, which is no text")


def _is_encodable(text: str) -> bool:
    # JSON's \ud800 gives a str that no tokenizer accepts.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:40]}{'...' if len(text) > 40 else ''} ({type(value).__name__})"


def _is_unlabelled(task: GlueTask, value: Any) -> bool:
    """No value, or -1 where that is no class of the task."""
    if isinstance(value, (list, dict)):
        return False
    return value in _ABSENT or (value in _MINUS_ONE and "-1" not in task.labels)


def class_text(value: Any) -> str | None:
    """A label as text: "1" for 1, 1.0 and "1"; "true" for True; None where it cannot be a class."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, (str, int)) and value != "" else None


def _ids_by_label(task: GlueTask, table: Table) -> dict[Any, int]:
    """What may stand in the label column -> class id in the order of `task.labels`."""
    by_name: dict[Any, int] = {name: at for at, name in enumerate(task.labels)}
    if task.is_official:
        # Numbers mean GLUE's own class order; a user's own classes are known by their text only.
        for at in range(len(task.labels)):
            by_name |= {at: at, str(at): at, f"{at}.0": at}
    names = table.class_names.get(LABEL)
    if names is None:
        return by_name
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise DataError(
            f"{table.origin}: label names {', '.join(map(repr, names))} do not fit the task; "
            f"expected: {', '.join(task.labels)}"
        )
    # The data set numbers its classes itself: by name, never by number.
    return {at: by_name[name] for at, name in enumerate(names)}


def _classes(task: GlueTask, table: Table, raw: list, problems: Problems) -> list[int]:
    ids = _ids_by_label(task, table)
    choices = ", ".join(task.labels)
    if task.is_official:
        expected = f"is not one of: {choices} or 0-{len(task.labels) - 1}"
    else:
        expected = f"is not one of the training labels: {choices}"
    has_own_ids = task.is_official or LABEL in table.class_names
    labels = []
    for row, value in enumerate(raw):
        key = value if has_own_ids else class_text(value)
        # bool is an int in Python: True would pass for class 1.
        found = None if isinstance(key, (bool, list, dict)) else ids.get(key)
        if found is None:
            problems.add(table.where(row), _label_problem(task, value, expected))
        else:
            labels.append(found)
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


def as_number(value: Any) -> float | None:
    """A number, or a text that is one, as float; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _label_problem(task: GlueTask, value: Any, text: str) -> str:
    if value in _ABSENT:
        return "no label, but this split must be labelled"
    if _is_unlabelled(task, value):
        return f"label {value!r} means unlabelled, but this split must be labelled"
    return f"label {_shown(value)} {text}" if not isinstance(value, str) else f"label {value[:40]!r} {text}"


def sorted_labels(values: Collection[str]) -> tuple[str, ...]:
    """Distinct label texts in class order: numbers by value (9 before 10), texts by letter."""
    distinct = set(values)
    if all(re.fullmatch(r"-?\d+", value) for value in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))


_NOT_TEXTS = ("label", "labels", "idx", "index", "id", "")
_PAIR = ("sentence1", "sentence2")
_LOOKED_AT = 1000  # rows that decide whether a column is text


def fit_splits(task: GlueTask, available: set[str]) -> tuple[GlueTask, dict[str, str]]:
    """A GLUE task cut to the parts there are, and split -> part.

    Where a task has several evaluation splits and the data one `validation`, that is the first.
    """
    parts = {split: split for split in task.splits}
    if not {split for split, _, _ in task.evaluation} & available:
        task = replace(task, evaluation=task.evaluation[:1])
        parts[task.evaluation[0][0]] = "validation"
    if not {split for split, _ in task.test} & available:
        task = replace(task, test=task.test[:1])
        parts[task.test[0][0]] = "test"
    # Published scores and the leaderboard are about GLUE's rows, not these.
    return replace(task, published=(), leaderboard=None), parts


def describe(table: Table, name: str) -> GlueTask:
    """The task row of a user's data, told from its training part.

    Columns: sentence1 and sentence2 if both are there, else the first two (or the one) text columns.
    Labels: floats make a regression, else the classes are the distinct labels in order.

    Raises:
        DataError: no text column, no label column, or a single label.
    """
    labels = _labels(table)
    return own_task(re.sub(r"[^\w.-]", "_", name), text_columns(table), labels)


def text_columns(table: Table) -> tuple[str, ...]:
    """sentence1 and sentence2 if both are there, else the first two (or the one) columns of texts.

    Raises:
        DataError: there is none.
    """
    if all(name in table.columns for name in _PAIR):
        return _PAIR
    texts = [name for name, values in table.columns.items() if name.lower() not in _NOT_TEXTS and _is_text(values)]
    if not texts:
        raise DataError(f"{table.origin}: no column of texts; columns: {', '.join(table.columns)}")
    return tuple(texts[:2])


def _is_text(values: list) -> bool:
    """Whether a column has texts that are not just numbers (in csv everything is a str)."""
    return any(isinstance(value, str) and value and as_number(value) is None for value in values[:_LOOKED_AT])


def _labels(table: Table) -> tuple[str, ...]:
    values = table.column(LABEL)
    if LABEL in table.class_names:
        return table.class_names[LABEL]
    # Most labels, not all: one typing error must not turn 5,000 scores into 5,000 classes.
    numbers = sum(as_number(value) is not None for value in values)
    if any(_is_decimal(value) for value in values) and 2 * numbers > len(values):
        return ()
    texts = {text for text in map(class_text, values) if text is not None}
    if len(texts) < 2:
        only = f"all labels are {texts.pop()!r}" if texts else "there are no labels"
        raise DataError(f"{table.origin}: {only}; at least two different ones are needed")
    return sorted_labels(texts)


def _is_decimal(value: Any) -> bool:
    if isinstance(value, str):
        return as_number(value) is not None and re.fullmatch(r"\s*[+-]?\d+\s*", value) is None
    return isinstance(value, float)


def read_splits(
    task: GlueTask, parts: dict[str, str], read: Callable[[str], Table], splits: tuple[str, ...]
) -> dict[str, Split]:
    """The splits asked for; `read(part)` gives a part's table or raises where there is none."""
    unlabelled = {split for split, _ in task.test}
    return {split: make_split(task, split, read(parts[split]), split not in unlabelled) for split in splits}
