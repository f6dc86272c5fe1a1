"""From the text of one value to a checked Python value. Errors say what is wrong and what is accepted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import Flag
from bert_glue.errors import did_you_mean

TRUE_WORDS = ("true", "yes", "1", "on", "t", "y")
FALSE_WORDS = ("false", "no", "0", "off", "f", "n")
NONE_WORDS = ("none", "null")
# Python's own float() and int() also take 1_000, other scripts' digits, nan and inf.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_LARGEST_INT = 2**63 - 1
_SHOWN_LENGTH = 80
# A part of a path or name as templates have it: <model>, ${MODEL}, {{ model }}, %MODEL%, REPLACE_ME, YOUR_MODEL, ...
_PLACEHOLDER = re.compile(
    r"<[^<>]+>|\$\w+|\$?\{+[^{}]+\}+|%\w+%|(?i:(replace|change|fill|insert|edit|fix)[ _-]?(me|this|in))"
    r"|(?i:your[ _-].+)|TO_?DO|TBD|\.{3}|\u2026"
)


def shown(text: str) -> str:
    """`text` quoted on one line, cut where it is very long."""
    return repr(text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "...")


def flag_value(flag: Flag, text: str) -> Any:
    """The value that `text` means for `flag`; None for "none" where the flag may be left open.

    Raises:
        ValueError: `text` is no value of this flag; the message is one line and goes after the flag's name.
    """
    if flag.optional and text.lower() in NONE_WORDS and text not in flag.choices:
        return None
    if not flag.many and not flag.verbatim and is_placeholder(text):
        value = "a value" if flag.secret else shown(text)
        raise ValueError(f"{value} is a placeholder of a template; put in its place: {flag.text}")
    return _READERS[flag.kind](flag, text)


def is_placeholder(text: str) -> bool:
    """Whether a template's value was left as it is; what exists as a file or folder is none."""
    parts = text.split("/")
    is_example = ("path", "to") in zip(parts, parts[1:], strict=False)
    return (is_example or any(map(_PLACEHOLDER.fullmatch, parts))) and not Path(text).exists()


def read_bool(text: str) -> bool:
    """True or false in any usual spelling.

    Raises:
        ValueError: neither.
    """
    if text.lower() in TRUE_WORDS:
        return True
    if text.lower() in FALSE_WORDS:
        return False
    raise ValueError(f"{shown(text)} is not true or false")


def _read_text(flag: Flag, text: str) -> str:
    if not text or "\0" in text:
        raise ValueError(f"{shown(text)} is not a value")
    if flag.many and flag.choices:
        return _read_choices(flag, text)
    if flag.choices and text not in flag.choices:
        raise ValueError(did_you_mean("value", text[:_SHOWN_LENGTH], list(flag.choices)))
    if flag.pattern and not re.fullmatch(flag.pattern, text):
        raise ValueError(f"{shown(text)} is not {flag.text}")
    return text


def _read_choices(flag: Flag, text: str) -> str:
    chosen = [part.strip() for part in text.split(",")]
    for part in chosen:
        if part not in flag.choices:
            raise ValueError(did_you_mean("value", part[:_SHOWN_LENGTH], list(flag.choices)))
    return ",".join(dict.fromkeys(chosen))


def read_number(text: str, kind: str = "float") -> float | int:
    """A finite decimal number; `kind` "int" takes 1e3 and 1000.0 too, but no fraction.

    Raises:
        ValueError: no number, too large, or a fraction where a whole number is asked for.
    """
    article = "a whole number" if kind == "int" else "a number"
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is not {article}{' (must be finite)' if value == math.inf else ''}")
    if kind == "float":
        return value
    if not value.is_integer():
        raise ValueError(f"{shown(text)} is not {article}")
    if abs(value) > _LARGEST_INT:
        raise ValueError(f"{shown(text)} is too large")
    # Digits alone are read exactly: a float would round seeds above 2**53.
    return int(text) if text.lstrip("+-").isdigit() else int(value)


def _read_ranged(flag: Flag, text: str) -> float | int:
    accepted = f"; accepted: {flag.range}" if flag.range else ""
    try:
        value = read_number(text, flag.kind)
    except ValueError as error:
        raise ValueError(f"{error}{accepted}") from None
    if not in_range(value, flag.range):
        raise ValueError(f"{shown(text)} is out of range{accepted}")
    return value


def in_range(value: float, accepted: str) -> bool:
    """True if `value` lies in one part of a range such as "-1 or [1, inf)"; always for an empty range."""
    return not accepted or any(_in_part(value, part) for part in accepted.split(" or "))


def _in_part(value: float, part: str) -> bool:
    if part[0] not in "[(":
        return value == float(part)
    low, high = (float(end) for end in part[1:-1].split(","))
    above = value >= low if part[0] == "[" else value > low
    below = value <= high if part[-1] == "]" else value < high
    return above and below


_READERS: dict[str, Callable[[Flag, str], Any]] = {
    "str": _read_text,
    "int": _read_ranged,
    "float": _read_ranged,
    "bool": lambda flag, text: read_bool(text),
}


def read_steps(text: str) -> tuple[int, int]:
    """First and last optimizer step of a range, both meant, counted from 1.

    Raises:
        ValueError: not `first:last`, or no step at all.
    """
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"{shown(text)} is not first:last, such as 10:15; steps count from 1, both are meant")
    return int(found[1]), int(found[2])


def is_hub_name(name: str) -> bool:
    """Whether a hub may have a repository of this name: `name` or `owner/name`, in ASCII."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII) is not None


def is_path(name: str) -> bool:
    """Whether a name can only mean a folder of this machine: `./x`, `/x`, `~/x`, or more than one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
