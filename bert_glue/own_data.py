"""A user's own data: which columns are the texts, what the classes are, which part is which split."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bert_glue.errors import DataError
from bert_glue.splits import LABEL, Split, as_number, class_text, make_split, sorted_labels
from bert_glue.tables import Table
from bert_glue.tasks import GlueTask, own_task

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
