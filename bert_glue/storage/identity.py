"""The facts that an interrupted piece of work and its continuation must share, and how differences are reported.

A checkpoint and the progress file of a prediction store such facts. The stored keys are identifiers. The labels are for
messages and may change at any time. Files of earlier versions have the label of that version as the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_SHORT = 60  # characters; a reader learns nothing from longer values, such as hashes and shapes


class Fact(NamedTuple):
    """One fact.

    Args:
        key: key in the stored file.
        label: name in messages.
        former_key: key in files of earlier versions, which was the label then; "" if it is still the same.
    """

    key: str
    label: str
    former_key: str = ""


def flag_facts(names: Iterable[str]) -> tuple[Fact, ...]:
    """Facts that are the values of flags."""
    return tuple(Fact(name, f"--{name}") for name in names)


def with_current_keys(facts: Iterable[Fact], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stored facts by their current keys; anything that is not in `facts` is left out."""
    written = {fact.key: (fact.former_key or fact.label, fact.key) for fact in facts}
    return {key: stored[name] for key, names in written.items() for name in names if name in stored}


def differences(facts: Iterable[Fact], then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The facts that differ, such as `--seed (42, now 7); training rows (29, now 20)`; "" if none differs.

    Args:
        then, now: values by key; a fact that is missing in both counts as equal.
    """
    found = []
    for fact in facts:
        before, after = then.get(fact.key), now.get(fact.key)
        if before != after:
            is_short = len(f"{before}{after}") < _SHORT
            found.append(f"{fact.label} ({before}, now {after})" if is_short else fact.label)
    return "; ".join(found)
