"""Which class is number n: the vocabulary of a model or of training data, and the labels of a file held against it."""

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
_UNNAMED = re.compile(r"LABEL_\d+")
_STATES = {"accept", "accepted", "approved", "submitted", "reject", "rejected", "ignore", "ignored", "skip", "skipped",
           "discarded", "cancelled", "canceled", "pending", "draft", "completed"}  # fmt: skip
_UNUSABLE = _STATES - {"accept", "accepted", "approved", "submitted", "completed"}
_FLAGGED = re.compile(r"(was_|is_)?(rejected|cancell?ed|skipped|ignored|discarded|deleted|ground_truth_missing)")
_MOST_SHOWN = 20


@dataclass(frozen=True)
class ClassVocabulary:
    """The classes of a task in the order of the classifier's outputs.

    Args:
        names: in class order.
        owner: whose they are, for messages: "the model" or "the training data".
        has_numbers: a number in a file means the class of that number, as in GLUE.
    """

    names: tuple[str, ...]
    owner: str
    has_numbers: bool = False

    @property
    def is_unnamed(self) -> bool:
        """True where transformers made up the names: LABEL_0, LABEL_1, ..."""
        return all(_UNNAMED.fullmatch(name) for name in self.names)

    def match(self, table: Table, column: str) -> tuple[dict[str, str], list[str]]:
        """Label of a file -> name of its class, and what to tell the user.

        A label matches its name exactly, else a name that differs in case only, if there is one such name. -1 is
        left to `make_split`, which refuses unlabelled rows.

        Raises:
            DataError: a label matches no class; it names the first such row and shows both lists.
        """
        labels = [text for text in distinct_labels(table, column) if text != "-1" or text in self.names]
        if self.is_unnamed and not set(labels) <= set(self.names):
            found, notes = self._match_unnamed(labels, table.origin)
        else:
            matches = {label: self._find(label) for label in labels}
            found = {label: match for label, match in matches.items() if match is not None}
            changed = {label: name for label, name in found.items() if label != name}
            notes = [f"{table.origin}: label {label!r} is {name!r} of {self.owner}" for label, name in changed.items()]
        missing = [label for label in labels if label not in found]
        if missing:
            row = next(at for at, value in enumerate(table.column(column)) if missing[0] in texts_of(value))
            raise DataError(self._refusal(missing, labels, table.where(row)))
        return found, notes[:_MOST_SHOWN]

    def _find(self, label: str) -> str | None:
        if label in self.names:
            return label
        alike = [name for name in self.names if name.casefold() == label.casefold()]
        if len(alike) == 1:
            return alike[0]
        if self.has_numbers and _is_number_below(label, len(self.names)):
            return self.names[int(label)]
        return None

    def _match_unnamed(self, labels: list[str], origin: str) -> tuple[dict[str, str], list[str]]:
        if all(_is_number_below(label, len(self.names)) for label in labels):
            return {label: f"LABEL_{int(label)}" for label in labels}, [
                f"{origin}: {self.owner} has no names for its classes; number n is taken for LABEL_n"
            ]
        if len(labels) != len(self.names):
            return {}, []
        order = dict(zip(sorted_labels(labels), self.names, strict=True))
        said = ",".join(f"{label}={name}" for label, name in order.items())
        return order, [
            f"warning: {origin}: {self.owner} calls its classes LABEL_n, so that their order is a guess: {said}; "
            f'--label_map "{said}" says it'
        ]

    def _refusal(self, missing: list[str], labels: list[str], where: str) -> str:
        example = ",".join(f"{label}={name}" for label, name in zip(missing, self.names, strict=False))
        return (
            f"{where}: label {shown(missing)} is no class of {self.owner}; "
            f"classes of {self.owner}: {shown(self.names)}; "
            f'labels of the file: {shown(sorted_labels(labels))}; --label_map, such as "{example}", says which is which'
        )


def _is_number_below(label: str, limit: int) -> bool:
    return re.fullmatch("[0-9]+", label) is not None and int(label) < limit


@dataclass(frozen=True)
class LabelFlags:
    """What the command line says of labels and rows.

    Args:
        translated: text in the label column -> class it stands for.
        dropped: column -> values whose rows are left out; None: nothing was said.
        is_regression: None where the labels decide.
        is_multi_label: a row may have several labels; likewise.
        delimiter: parts several labels in a text.
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
        raise UsageError(f"--{flag} {part}: is not NAME=VALUE")
    return name, value


def shown(names: Iterable[str]) -> str:
    """Names in quotes, twenty at most."""
    names = list(names)
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(map(repr, names[:_MOST_SHOWN])) + more


def labelled_rows(table: Table, label: str, flags: LabelFlags) -> tuple[Table, list[str]]:
    """The rows to train or to score on, each with one label as text (or a number), and what to tell the user.

    Lists of one label become that label, and the numbers of a file that names its classes become names.

    Raises:
        DataError: rows whose label cannot be used and that `--drop_rows` does not speak of.
    """
    names = table.class_names.get(label)
    values = [_single(value) for value in table.column(label)]
    several = (row for row, value in enumerate(values) if isinstance(value, list) and len(value) > 1)
    row = next(several, None)
    if row is not None:
        raise DataError(
            f"{table.where(row)}: label is a list of {len(values[row])}: one label a row is needed; if the model gives "
            f"several, --problem_type {MULTI_LABEL} says so"
        )
    if names is not None:
        values = [names[v] if type(v) is int and 0 <= v < len(names) else v for v in values]
    values = [flags.translated.get(class_text(value) or "", value) for value in values]
    table = replace(table, columns={**table.columns, label: values})
    kept, notes = without_dropped(table, label, flags)
    if any(isinstance(value, list) for value in table.column(label)):
        notes.append(f"{table.origin}: each label is a list of one: it is taken out of its list")
    return kept, notes


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _whole_text(value: Any) -> str | None:
    """The text that `--drop_rows` knows a value by, "" for an empty one; None for a list of several."""
    return None if isinstance(value, (list, tuple)) and len(value) > 1 else class_text(_single(value)) or ""


def without_dropped(table: Table, label: str, flags: LabelFlags) -> tuple[Table, list[str]]:
    """The table without the rows that `--drop_rows` leaves out, counted."""
    if flags.dropped is None:
        _refuse_unusable(table, label)
        return table, []
    notes, keep = [], [True] * len(table)
    for column, values in flags.dropped.items():
        texts = [_whole_text(value) for value in table.column(column)]
        for value in values:
            rows = [at for at, text in enumerate(texts) if text == value]
            notes.append(f"{table.origin}: {len(rows)} rows are left out: {column!r} is {value!r}")
            for at in rows:
                keep[at] = False
    rows = [at for at, is_kept in enumerate(keep) if is_kept]
    if not rows:
        raise DataError(f"{table.origin}: --drop_rows leaves no rows")
    return table.take(rows), notes


def _refuse_unusable(table: Table, label: str) -> None:
    """Refuses rows without a majority, and rows that an annotation tool marks as rejected or skipped."""
    counts = Counter(value for value in table.columns.get(label, ()) if isinstance(value, str))
    if counts["-"] and any(re.search(r"\w\w", value) for value in counts):
        raise DataError(
            f"{table.origin}: {counts['-']} of {len(table)} rows have the label '-', which stands for no majority in "
            f"SNLI and its kin; --drop_rows \"{label}=-\" leaves them out, --drop_rows nothing makes '-' a class"
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
                f"{table.origin}: column {column!r} says {shown(sorted(marked))} in "
                f'{sum(states[state] for state in marked)} of {len(table)} rows; --drop_rows "{given}" leaves them '
                f"out, --drop_rows nothing keeps them{meant}"
            )


def translated(table: Table, label: str, names: dict[str, str]) -> Table:
    """The table with each label under its class's name; what is not in `names` stays as it is."""

    def one(value: Any) -> Any:
        return [one(own) for own in value] if isinstance(value, list) else names.get(class_text(value) or "", value)

    return replace(table, columns={**table.columns, label: list(map(one, table.column(label)))}, class_names={})


def distinct_labels(table: Table, label: str) -> list[str]:
    """The different labels of a column as text, in order of appearance; -1 counts as unlabelled."""
    texts = (text for value in table.column(label) for text in texts_of(value))
    return list(dict.fromkeys(text for text in texts if text is not None))


def texts_of(value: Any) -> list[str | None]:
    """The labels of a row as text: one, or those of a list."""
    return [class_text(one) for one in value] if isinstance(value, (list, tuple)) else [class_text(value)]


def class_text(value: Any) -> str | None:
    """A label as text: "1" for 1, 1.0 and "1"; "true" for True; None where it cannot be a class."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, (str, int)) and value != "" else None


def as_number(value: Any) -> float | None:
    """A number, or a text that is one in decimal digits, as float; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return None
    try:
        return float(value)
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
    """The classes that training data has, () for scores, and what to tell the user.

    Numbers with a fraction are scores, other labels are classes; `--do_regression` overrules.

    Args:
        has_sets: each row has a list of labels.

    Raises:
        DataError: fewer than two classes, rows that all have the same labels, or numbers that may be either.
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
        raise DataError(f"{table.origin}: {only}; at least two different ones are needed")
    return sorted_labels(texts), [*notes, *_alike(table, values), *_single_rows(table, texts)]


def _single_rows(table: Table, texts: set[str]) -> list[str]:
    """A warning where labels identify rows more than they class them."""
    if len(texts) <= _MOST_SHOWN or 2 * len(texts) <= len(table):
        return []
    return [
        f"warning: {table.origin}: {len(texts)} classes for {len(table)} rows, most with one row; if these are not the "
        "labels, --label_column_name names their column"
    ]


def _classes_of_sets(table: Table, label: str) -> tuple[tuple[str, ...], list[str]]:
    sets = [value for value in table.column(label) if value is not None]
    if len({frozenset(value) for value in sets}) < 2:
        only = f"all labels are {sets[0]}" if any(sets) else "there are no labels"
        raise DataError(f"{table.origin}: {only}; at least two rows must differ")
    names = [name for value in sets for name in value]
    classes = table.class_names.get(label) or sorted_labels(set(names))
    absent = sorted(set(classes) - set(names))
    notes = [f"warning: {table.origin}: no row has {shown(absent)}"] if absent else []
    return classes, notes + _alike(table, names)


def _are_scores(table: Table, label: str) -> tuple[bool, list[str]]:
    values = table.column(label)
    numbers = [number for number in map(as_number, values) if number is not None]
    fractions = [number for number in numbers if not float(number).is_integer()]
    # Most labels, not all: one typing error must not turn 5,000 scores into 5,000 classes.
    if fractions and 2 * len(numbers) > len(values):
        return True, [f"the labels are scores ({fractions[0]:g} is one); --do_regression false makes them classes"]
    commas = (row for row, v in enumerate(values) if isinstance(v, str) and re.fullmatch(r"\s*[+-]?\d+,\d+\s*", v))
    row = next(commas, None)
    if row is not None:
        raise DataError(
            f"{table.where(row)}: label {values[row]!r} has a decimal comma; numbers have a point. Several labels "
            'a row need --label_delimiter ","'
        )
    row = next((row for row, value in enumerate(values) if _is_pointed(value)), None)
    if row is not None and len(numbers) == len(values):
        raise DataError(
            f"{table.where(row)}: labels such as {values[row]!r} are whole numbers written as fractions: "
            "--do_regression true if they are scores, --do_regression false if they are classes"
        )
    return False, []


def _is_pointed(value: Any) -> bool:
    """True for a float, and for a text such as 3.0."""
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
                f"and are {len(texts)} classes; --label_map can join them"
            )
    return warnings
