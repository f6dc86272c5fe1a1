"""Chooses the text and label columns of a user's table: by flags, or by content if the choice is certain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bert_glue.config.arguments import Arguments
from bert_glue.data.tables import Table
from bert_glue.errors import DataError

_LABEL_NAMES = ("label", "labels")
_TEXT_NAMES = ("text", "sentence")
_PAIRS = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"), ("text1", "text2"),
    ("text_1", "text_2"), ("text_a", "text_b"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"),
)  # fmt: skip
_IDENTIFIER = re.compile(
    r"(.*[_\W])?(id|ids|idx|index|guid|uuid|key|hash|url|uri|link|file|filename|path|date|time|timestamp)"
    r"|.*(Id|ID|Idx)|.*_at|unnamed.*|"
)
_LOOKED_AT = 1000  # the first rows decide what a column holds
_SHOWN_ROWS, _SHOWN_LETTERS = 3, 60
# Scripts without spaces between words: four letters count as several words.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{4}")
_QUOTED = re.compile(r'"[^"]*""(?:[^"]|"")*"')
_NUMBER = re.compile(r"\s*[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?\s*%?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class ColumnFlags:
    """The flags about the columns of a table.

    Args:
        texts: the text columns (`--text_column_names`). () if they are to be chosen.
        label: the label column (`--label_column_name`), or a column of 0 and 1 per class, separated by commas.
            None if it is to be chosen.
        removed: columns that are neither (`--remove_columns`).
    """

    texts: tuple[str, ...] = ()
    label: str | None = None
    removed: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: Arguments) -> ColumnFlags:
        """The flags of a run."""
        return cls(names_in(args.text_column_names), args.label_column_name, names_in(args.remove_columns))


@dataclass(frozen=True)
class Columns:
    """The chosen columns.

    Args:
        texts: at least one column, in the order in which the model reads them.
        label: None if there is none; several are separated by commas.
        left_out: every other column -> the reason why it is not used.
    """

    texts: tuple[str, ...]
    label: str | None
    left_out: dict[str, str]

    def lines(self, table: Table) -> Iterator[str]:
        """Log lines with the choice and the first three rows."""
        line = f"columns: text {', '.join(map(repr, self.texts))}"
        labels = parts_of_label(table, self.label)
        if labels:
            line += f"; {'labels' if len(labels) > 1 else 'label'} {', '.join(map(repr, labels))}"
        if self.left_out:
            line += "; left out: " + ", ".join(f"{name!r} ({why})" for name, why in self.left_out.items())
        yield line
        shown = (*self.texts, *labels)
        for row in range(min(_SHOWN_ROWS, len(table))):
            yield "  " + " | ".join(_cut(table.columns[name][row]) for name in shown)


def names_in(text: str | None) -> tuple[str, ...]:
    """The names in the value of a flag, separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


def parts_of_label(table: Table, label: str | None) -> tuple[str, ...]:
    """The label column, or several columns if each holds the zeros and ones of one class."""
    if label is None:
        return ()
    names = names_in(label)
    is_one = label in table.columns or len(names) < 2
    return (label,) if is_one else names


def unescaped(delimiter: str) -> str:
    r"""A delimiter in which the letters \n and \t, as a shell passes them, stand for a line end and a tab."""
    return delimiter.replace("\\n", "\n").replace("\\t", "\t")


def choose_columns(table: Table, flags: ColumnFlags, is_labelled: bool, known: tuple[str, ...] = ()) -> Columns:
    """The text columns and the label column of a table.

    Args:
        is_labelled: the table must have a label column.
        known: the text columns that a finished model was trained on. () if they are not known.

    Raises:
        DataError: a flag names a missing column, or the choice is not certain. The error lists the columns.
    """
    label = _label(table, flags, is_labelled)
    labels = parts_of_label(table, label)
    removed = (*flags.removed, *labels)
    texts = tuple(_named(table, name, "--text_column_names") for name in flags.texts)
    single = labels[0] if len(labels) == 1 else None
    why = {name: _why_not_text(table, name, single) for name in table.columns if name not in (*removed, *texts)}
    if not texts and known and all(name in table.columns for name in known):
        texts = known
    texts = texts or _certain_texts(table, why)
    if both := [name for name in labels if name in texts]:
        raise DataError(
            f"{table.origin}: column {both[0]!r} is both label and text; name another label by --label_column_name"
        )
    left_out = {name: reason or "not named" for name, reason in why.items() if name not in texts}
    return Columns(texts, label, left_out)


def check_quoting(table: Table, columns: tuple[str, ...]) -> None:
    """Refuses a tsv file with the quoting of csv, because its quotes would become part of the texts.

    Raises:
        DataError: a text is quoted and has doubled quotes inside (file:line).
    """
    if not table.origin.lower().endswith(".tsv"):
        return
    for name in columns:
        for row, value in enumerate(table.columns.get(name, ())):
            if isinstance(value, str) and _QUOTED.fullmatch(value):
                raise DataError(
                    f"{table.where(row)}: column {name!r} is quoted as in csv ({_cut(value)}), but tsv has no quoting; "
                    "write the file as csv or jsonl (pandas: to_csv without sep), or with quoting=csv.QUOTE_NONE"
                )


def _named(table: Table, name: str, flag: str) -> str:
    if name in table.columns:
        return name
    alike = [column for column in table.columns if str(column).strip().lower() == name.strip().lower()]
    hint = f"; did you mean {alike[0]!r}?" if len(alike) == 1 else ""
    raise DataError(f"{table.place}: {flag} {name}: no column {name!r}; columns: {table.names}{hint}")


def _label(table: Table, flags: ColumnFlags, is_labelled: bool) -> str | None:
    if flags.label is not None:
        names = parts_of_label(table, flags.label)
        if is_labelled or all(name in table.columns for name in names):
            return ",".join(_named(table, name, "--label_column_name") for name in names)
    alike = [name for name in table.columns if str(name).strip().lower() in _LABEL_NAMES]
    if "label" in alike or len(alike) == 1:
        return "label" if "label" in alike else alike[0]
    if not is_labelled:
        return None
    raise DataError(
        f"{table.place}: no column 'label'; columns: {table.names}; "
        f"name it by --label_column_name{_candidates(table)}{_without_header(table)}{_nested(table)}"
    )


def _candidates(table: Table) -> str:
    """A hint at the columns whose values repeat like classes."""
    plain = {name: values for name, values in table.columns.items() if name not in _objects_in(table)}
    counts = {name: len(set(map(str, values[:_LOOKED_AT]))) for name, values in plain.items()}
    few = [f"{name!r} has {n} different values" for name, n in counts.items() if 1 < n <= 20 and 2 * n <= len(table)]
    outcomes = [str(name) for name, values in table.columns.items() if _are_outcomes(values[:_LOOKED_AT])]
    said = f" ({', '.join(few)})" if few else ""
    if len(outcomes) > 1:
        said += f"; or one column of 0 and 1 per class: {','.join(outcomes)}"
    return said


def _objects_in(table: Table) -> list[Any]:
    """Columns of JSON objects, or of lists of them."""

    def has_objects(value: Any) -> bool:
        return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict) for one in value))

    return [name for name, values in table.columns.items() if any(map(has_objects, values[:_LOOKED_AT]))]


def _nested(table: Table) -> str:
    """The hint for rows whose fields are nested; "" for others."""
    if not (found := _objects_in(table)):
        return ""
    names = ", ".join(map(repr, found))
    return f"; {names}: objects, whose fields must become columns of their own (pandas.json_normalize)"


def _are_outcomes(values: list) -> bool:
    return all(str(value).lower() in ("0", "1", "true", "false") for value in values)


def _without_header(table: Table) -> str:
    """A hint for tables whose column names look like the values of a row. "" for other tables."""
    if table.unit == "line" and any(_NUMBER.fullmatch(str(n)) or len(str(n).split()) > 4 for n in table.columns):
        return "; the first line looks like a row, and it must be a header with the names of the columns"
    return ""


def _certain_texts(table: Table, why: dict[str, str | None]) -> tuple[str, ...]:
    """The only text column, or the two columns of a well-known pair.

    Args:
        why: each column -> the reason why it cannot be a text. None if it can.

    Raises:
        DataError: no such choice, or several are possible.
    """
    if header := _without_header(table):
        raise DataError(f"{table.place}: columns: {table.names}{header}, or name the text by --text_column_names")
    lower = {str(name).strip().lower(): name for name in why}
    texts = [name for name in why if _are_texts(table.columns[name])]
    pairs = [tuple(lower[name] for name in pair) for pair in _PAIRS if all(name in lower for name in pair)]
    pairs = [pair for pair in pairs if all(name in texts for name in pair)]
    if pairs:
        pair = pairs[0]
        derived = tuple(f"{str(name).lower()}_" for name in pair)  # such as sentence1_parse in SNLI
        others = [name for name, reason in why.items() if name not in pair and not reason]
        rest = [name for name in others if not str(name).lower().startswith(derived)]
        if not rest and len(pairs) == 1:
            return pair
        paired = list(dict.fromkeys(name for pair in pairs for name in pair))
        raise _undecided(table, why, paired + rest)
    found = [name for name in texts if not why[name] or str(name).strip().lower() in _TEXT_NAMES]
    if not found:
        # A column of single words or few different texts is chosen only if no other column can be a text.
        found = [name for name in texts if why[name] in _WEAK]
    if len(found) != 1:
        raise _undecided(table, why, found)
    return (found[0],)


def _undecided(table: Table, why: dict[str, str | None], found: list[str]) -> DataError:
    others = ", ".join(f"{name!r}: {reason}" for name, reason in why.items() if name not in found and reason)
    nested = "" if found else _nested(table)
    said = f"the text may be {' or '.join(map(repr, found))}" if found else "no column looks like text"
    return DataError(
        f"{table.origin}: {said}; columns: {table.names}; name one text column, or the two of a pair, by "
        "--text_column_names" + (f" ({others})" if others else "") + nested
    )


_WORDS, _FEW = "single words", "few different values"
_WEAK = (_WORDS, _FEW)


def _are_texts(values: list) -> bool:
    return any(isinstance(value, str) and value.strip() for value in values[:_LOOKED_AT])


def _why_not_text(table: Table, name: Any, label: str | None) -> str | None:
    """The reason why a column cannot be a text. None if it can."""
    values = [value for value in table.columns[name][:_LOOKED_AT] if value not in (None, "", [], {})]
    texts = [value for value in values if isinstance(value, str)]
    if not values:
        return "empty"
    if not texts:
        return "lists or objects" if isinstance(values[0], (list, dict)) else "numbers"
    if all(_NUMBER.fullmatch(value) for value in texts):
        return "numbers"
    if label is not None and _spells(table, name, label):
        return "one value for each label"
    is_prose = 2 * sum(map(_is_prose, texts)) > len(texts)
    distinct = len(set(texts))
    if not is_prose and (_IDENTIFIER.fullmatch(str(name)) or _are_identifiers(texts, distinct)):
        return "identifiers"
    if not is_prose:
        return _WORDS
    return _FEW if len(texts) >= 5 * distinct or distinct == 1 < len(texts) else None


def _is_prose(text: str) -> bool:
    return len(re.findall(r"[^\W\d_]+", text)) > 1 and " " in text.strip() or _UNSPACED.search(text) is not None


def _are_identifiers(texts: list[str], distinct: int) -> bool:
    """True for values that identify rows: all different, with digits, without spaces."""
    return distinct == len(texts) > 1 and all(re.search(r"\d", text) and " " not in text for text in texts)


def _spells(table: Table, name: Any, label: str) -> bool:
    """Whether a column spells out the labels: exactly one value for each label, and a different one for each."""
    pairs = list(zip(table.columns[name][:_LOOKED_AT], map(str, table.columns[label][:_LOOKED_AT]), strict=True))
    there = {(str(value), own) for value, own in pairs}
    values, labels = {value for value, _ in there}, {own for _, own in there}
    return len(there) == len(values) == len(labels) > 1 and len(pairs) >= 2 * len(there)


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."
