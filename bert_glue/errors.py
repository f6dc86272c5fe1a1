"""Errors a user can mend. Each carries its documented exit code and is printed as plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple


class UserError(Exception):
    """Base of all mistakes a user can mend; `str(error)` is complete, one problem a line.

    Args:
        what: what is wrong.
        fix: the way out, printed behind it.
        more: further lines.
    """

    exit_code = 2

    def __init__(self, what: str, fix: str = "", more: tuple[str, ...] = ()):
        super().__init__("\n".join((f"{what}; {fix}" if fix else what, *more)))
        self.what = what
        self.fix = fix


class UsageError(UserError):
    """A flag, its value, or a combination of flags is wrong."""

    exit_code = 2


class DataError(UserError):
    """A data file or data set is missing or broken; the message names file:line."""

    exit_code = 3


class MachineError(UserError):
    """The environment, the device or a model folder is not able to do what was asked."""

    exit_code = 4


class DivergedError(UserError):
    """Loss, gradients or weights stopped being finite; nothing was saved after that."""

    exit_code = 5


class CheckpointError(UserError):
    """A checkpoint is damaged or cannot be written."""

    exit_code = 6


class RankError(UserError):
    """The ranks of a run lost each other: one ended, or did not answer in time."""

    exit_code = 7


class ExpectationError(UserError):
    """A bound of `--expect` was missed; all results were written."""

    exit_code = 8


class BaselineError(UserError):
    """A run was slower than the baseline it was held against; all results were written."""

    exit_code = 9


def did_you_mean(kind: str, name: str, choices: list[str]) -> str:
    """One line: the unknown `name`, its nearest match if any, and all `choices`."""
    import difflib

    nearest = difflib.get_close_matches(name, choices, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return f"unknown {kind} {name!r}.{hint} Choices: {', '.join(choices)}"


def first_line(error: BaseException) -> str:
    """What an exception says, for one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def exit_code_of(action: Callable[[], int]) -> int:
    """Runs a command; a user's mistake becomes its lines on stderr and its exit code, without traceback."""
    try:
        return action()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


class Problem(NamedTuple):
    """One line for the user, and the flags it is about.

    A problem is left out where one of its flags was already reported: it would only be an echo.
    """

    flags: tuple[str, ...]
    text: str
