"""Converts the text of one value to a checked Python value. Errors name the problem and the accepted values."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import Flag
from bert_glue.errors import did_you_mean

TRUE_WORDS = ("true", "yes", "1", "on", "t", "y")
FALSE_WORDS = ("false", "no", "0", "off", "f", "n")
NONE_WORDS = ("none", "null")
# Python's own float() and int() also accept 1_000, digits of other scripts, nan and inf.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_LARGEST_INT = 2**63 - 1
_SHOWN_LENGTH = 80
_LONGEST_NAME = 255  # bytes of one part of a path: NAME_MAX of Linux
# A placeholder of a template as a whole part of a path or name: %MODEL%, REPLACE_ME, YOUR_MODEL, hf_xxx, ...
_PLACEHOLDER = re.compile(
    r"\$\w+|\$?\{+[^{}]+\}+|%\w+%|(?i:(replace|change|fill|insert|edit|fix)[ _-]?(me|this|in))"
    r"|(?i:your[ _-].+)|TO_?DO|TBD|(hf_)?(\.{3}|\u2026|\*+)|hf_[xX]{3,}"
)
# The same within a part: <model>.csv, runs-${SEED}, $NAME.csv. A shell leaves $NAME as it is in single quotes.
_PLACEHOLDER_WITHIN = re.compile(r"(?<!\w)<[^\W\d][^<>]*>(?!\w)|\$[^\W\d]\w*|\$\{[^{}]+\}|\{\{[^{}]+\}\}")


def shown(text: str) -> str:
    """`text` in quotes on one line, shortened if it is very long."""
    return repr(text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "...")


def flag_value(flag: Flag, text: str) -> Any:
    """The value that `text` means for `flag`; None for "none" if the flag may be unset.

    Raises:
        ValueError: `text` is not a value of this flag. The message is one line to print after the flag's name.
    """
    if flag.optional and text.lower() in NONE_WORDS and text not in flag.choices:
        return None
    is_name = flag.kind == "str" and not (flag.many or flag.verbatim or flag.secret)
    # Refused here: every look at such a path raises an OSError of its own, wherever the run first looks.
    if is_name and any(len(part.encode(errors="surrogateescape")) > _LONGEST_NAME for part in text.split("/")):
        raise ValueError(f"{shown(text)} has a name of more than {_LONGEST_NAME} bytes, which no file system holds")
    if not flag.many and not flag.verbatim and is_placeholder(text):
        raise ValueError(placeholder_problem("a value" if flag.secret else shown(text), flag.text))
    return _READERS[flag.kind](flag, text)


def is_placeholder(text: str) -> bool:
    """Whether the value is an unfilled placeholder. A name that exists as a file or folder is not one."""
    parts = text.split("/")
    is_example = ("path", "to") in zip(parts, parts[1:], strict=False)
    is_unfilled = is_example or _PLACEHOLDER_WITHIN.search(text) or any(map(_PLACEHOLDER.fullmatch, parts))
    return bool(is_unfilled) and not Path(text).exists()


def placeholder_problem(value: str, meaning: str) -> str:
    """What a user reads of a placeholder.

    Args:
        value: the placeholder as it is shown.
        meaning: what belongs in its place.
    """
    return f"{value} is a placeholder of a template; replace it by: {meaning}"


def read_bool(text: str) -> bool:
    """True or False, in any usual spelling.

    Raises:
        ValueError: the text is neither.
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


_MOST_SECONDS = 1e8  # three years; the system's timers end not far above


def read_seconds(text: str) -> float:
    """A time limit of a command, above 0, as a `type` of argparse; nan and inf would be none.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        seconds = float(read_number(text))
    except ValueError as error:
        raise ArgumentTypeError(error) from None
    if not 0 < seconds <= _MOST_SECONDS:
        raise ArgumentTypeError(f"{shown(text)} is not a number of seconds in (0, {_MOST_SECONDS:g}]")
    return seconds


def read_number(text: str, kind: str = "float") -> float | int:
    """A finite decimal number. `kind` "int" also accepts 1e3 and 1000.0, but no fraction.

    Raises:
        ValueError: not a number, too large, or a fraction instead of a whole number.
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
    # Plain digits are read exactly; a float would round seeds above 2**53.
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
    """Whether `value` lies in one part of a range such as "-1 or [1, inf)". True for an empty range."""
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
    """First and last optimizer step of a range, both included, counted from 1.

    Raises:
        ValueError: not `first:last`, or an empty range.
    """
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"{shown(text)} is not first:last, such as 10:15; steps count from 1, and both are included")
    return int(found[1]), int(found[2])


def is_hub_name(name: str) -> bool:
    """Whether the name is valid for a repository of the hub: `name` or `owner/name`, in ASCII."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII) is not None


def is_path(name: str) -> bool:
    """Whether a name can only mean a local folder: `./x`, `/x`, `~/x`, or more than one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
