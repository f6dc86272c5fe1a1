"""The classes of a model or of training data, in the order of the outputs, and how labels of a file match them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from bert_glue.data.own.classes import MOST_SHOWN, distinct_labels, shown, sorted_labels, texts_of
from bert_glue.data.tables import Table
from bert_glue.errors import DataError

_UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class ClassVocabulary:
    """The classes of a task in the order of the classifier's outputs.

    Args:
        names: in class order.
        owner: where the classes come from, for messages: "the model" or "the training data".
        has_numbers: a number in a file means the class of that number, as in GLUE.
    """

    names: tuple[str, ...]
    owner: str
    has_numbers: bool = False

    @property
    def is_unnamed(self) -> bool:
        """True if the names are the defaults of transformers: LABEL_0, LABEL_1, ..."""
        return all(_UNNAMED.fullmatch(name) for name in self.names)

    def match(self, table: Table, column: str) -> tuple[dict[str, str], list[str]]:
        """Label of a file -> name of its class, and log lines.

        A label matches the class with exactly its name, or else the only class whose name differs just in case. A
        label -1 is left to `make_split`, which refuses unlabelled rows.

        Raises:
            DataError: a label matches no class. The error names the first such row and shows both lists.
        """
        labels = [text for text in distinct_labels(table, column) if text != "-1" or text in self.names]
        if self.is_unnamed and not set(labels) <= set(self.names):
            found, notes = self._match_unnamed(labels, table.origin)
        else:
            matches = {label: self._find(label) for label in labels}
            found = {label: match for label, match in matches.items() if match is not None}
            changed = {label: name for label, name in found.items() if label != name}
            notes = [
                f"{table.origin}: label {label!r} is read as {name!r} of {self.owner}"
                for label, name in changed.items()
            ]
        missing = [label for label in labels if label not in found]
        if missing:
            row = next(at for at, value in enumerate(table.column(column)) if missing[0] in texts_of(value))
            raise DataError(self._refusal(missing, labels, table.where(row)))
        return found, notes[:MOST_SHOWN]

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
                f"{origin}: {self.owner} has no names for its classes; number n is read as LABEL_n"
            ]
        if len(labels) != len(self.names):
            return {}, []
        order = dict(zip(sorted_labels(labels), self.names, strict=True))
        said = ",".join(f"{label}={name}" for label, name in order.items())
        return order, [
            f"warning: {origin}: {self.owner} names its classes LABEL_n, so this order is a guess: {said}; "
            f'confirm or change it with --label_map "{said}"'
        ]

    def _example(self, missing: list[str], labels: list[str]) -> dict[str, str]:
        """What `--label_map` may look like: never a pair that is plainly wrong, because it may be copied."""
        alike = {_spelling(name): name for name in self.names}
        found = {label: alike[_spelling(label)] for label in missing if _spelling(label) in alike}
        if not found and len(missing) == len(labels):
            return dict(zip(missing, self.names, strict=False))
        return {label: found.get(label, "CLASS") for label in missing[:MOST_SHOWN]}

    def _refusal(self, missing: list[str], labels: list[str], where: str) -> str:
        example = ",".join(f"{label}={name}" for label, name in self._example(missing, labels).items())
        return (
            f"{where}: label {shown(missing)} is not a class of {self.owner}; "
            f"classes of {self.owner}: {shown(self.names)}; "
            f'labels of the file: {shown(sorted_labels(labels))}; map them with --label_map, such as "{example}"'
        )


def _spelling(name: str) -> str:
    """A name without case, white space, punctuation, and the two ways in which Unicode writes accents."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", name).casefold())


def _is_number_below(label: str, limit: int) -> bool:
    return re.fullmatch("[0-9]+", label) is not None and int(label) < limit
