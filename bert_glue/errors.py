"""Errors that a user can fix. Each has a documented exit code and is printed as plain lines."""

from __future__ import annotations

import errno
import io
import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, NoReturn, TextIO

ERROR_FILE = "BERT_GLUE_ERROR_FILE"  # names a file that receives the error that ends a command


def printable(text: str) -> str:
    """`text` as a terminal or a log may show it: what is neither printable, a space nor a line end is escaped.

    Names of classes, columns and files come from other people: a control character among them could rewrite the
    lines above, set the title of a window, or turn the reading direction.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\u00a0\u3000" else repr(c)[1:-1] for c in text)


def print_lines(*lines: str, file: TextIO | None = None) -> None:
    """Prints the lines in a printable form and flushes. `file` None is stdout."""
    for line in lines:
        print(printable(line), file=file, flush=True)


class UserError(Exception):
    """Base of all errors that a user can fix. `str(error)` is the full text, printable, one problem per line.

    Args:
        what: what is wrong.
        fix: the remedy, printed after it.
        more: further lines.
    """

    exit_code = 2

    def __init__(self, what: str, fix: str = "", more: tuple[str, ...] = ()):
        super().__init__(printable("\n".join((f"{what}; {fix}" if fix else what, *more))))
        self.what = what
        self.fix = fix


class UsageError(UserError):
    """A flag, its value, or a combination of flags is wrong."""

    exit_code = 2


class DataError(UserError):
    """A data file or data set is missing or invalid; the message names file:line."""

    exit_code = 3


class MachineError(UserError):
    """The environment, the device or the model folder cannot do what the flags require."""

    exit_code = 4


class DivergedError(UserError):
    """Loss, gradients or weights stopped being finite; nothing was saved after that."""

    exit_code = 5


class CheckpointError(UserError):
    """A checkpoint is damaged or cannot be written."""

    exit_code = 6


class RankError(UserError):
    """A rank of the run ended or did not answer in time."""

    exit_code = 7


class ExpectationError(UserError):
    """A bound of `--expect` was missed; all results were written."""

    exit_code = 8


class BaselineError(UserError):
    """A run was slower than its baseline; all results were written."""

    exit_code = 9


class FollowUpError(UserError):
    """Steps after training failed; the model and the results of the other steps were written.

    Args:
        exit_code: exit code of the first failure.
    """

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


class Failures:
    """Collects failures after the model is saved. A failure costs one line and the results of its own step.

    Args:
        is_alone: False on several ranks. A single rank cannot leave a step that has collectives.
        passes: exceptions that are not failures, such as a request to stop.
    """

    def __init__(self, is_alone: bool, passes: tuple[type[Exception], ...] = ()):
        self.is_alone, self.passes = is_alone, passes
        self.is_saved = False
        self.lines: list[str] = []
        self.exit_code = 0

    @contextmanager
    def step(self, name: str, is_collective: bool = False) -> Iterator[None]:
        """Catches the block's exception if a model was saved.

        Args:
            name: name of the step in the line.
            is_collective: other ranks wait for this one in the block.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, self.passes) or not self.is_saved or (is_collective and not self.is_alone):
                raise
            self.lines.append(f"{name} failed after the model was saved: {first_line(error)}")
            self.exit_code = self.exit_code or _exit_code(error)


def _exit_code(error: Exception) -> int:
    """The documented code of a failure; 1, Python's own code, for a defect of this program."""
    if isinstance(error, UserError):
        return error.exit_code
    kinds = ((MemoryError, MachineError), (OSError, CheckpointError))
    return next((kind.exit_code for family, kind in kinds if isinstance(error, family)), 1)


def did_you_mean(kind: str, name: str, choices: list[str]) -> str:
    """One line with the unknown `name`, its nearest match if there is one, and all `choices`."""
    import difflib

    nearest = difflib.get_close_matches(name, choices, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return f"unknown {kind} {name!r}.{hint} Choices: {', '.join(choices)}"


def first_line(error: BaseException) -> str:
    """The message of an exception on one line; its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# What the file system refuses wherever a path is looked at; pathlib's is_file() and exists() raise it too.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_CLOSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)


def _of_file_system(error: OSError) -> UserError | None:
    """What a user reads of an error that is about a path of his and not about this program; None for any other."""
    if error.filename is None or error.errno not in (*_FULL, *_CLOSED):
        return None
    kind = CheckpointError if error.errno in _FULL else MachineError
    return kind(f"{os.fsdecode(error.filename)}: {error.strerror}")


def exit_code_of(action: Callable[[], int]) -> int:
    """Runs a command. A user's error is printed to stderr and gives its exit code, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a log line must not end a run in a locale without UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        return action()
    except UserError as error:
        return _told(error)
    except OSError as error:
        known = _of_file_system(error)
        if known is None:
            raise
        return _told(known)
    except KeyboardInterrupt:
        return 130


def _told(error: UserError) -> int:
    """The exit code of an error that was printed, and handed over."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    _hand_over(error)
    return error.exit_code


READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended


def run_program(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs the `main` of a program and exits. A reader that leaves early, as `head` does, causes no traceback.

    Help that was cut off is no failure, so its exit code is 0. Anything else ends with `READER_GONE`.
    """
    argv = sys.argv[1:]
    code: str | int | None
    try:
        try:
            code = main(argv)
        except SystemExit as ending:  # argparse, after its help or an error
            code = ending.code
        sys.stdout.flush()
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout):
            raise  # a socket
        is_help = not {"-h", "--help"}.isdisjoint(argv)
        code = 0 if is_help else READER_GONE
        if not is_help:
            print("error: the reader of this program's output has ended", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
    sys.exit(code)


def _has_no_reader(stream: TextIO) -> bool:
    """Whether the other end of a pipe is closed: the kernel reports an error on it without being asked for one."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _hand_over(error: UserError) -> None:
    """Write the error as JSON to the file that the parent process named, if it named one."""
    if path := os.environ.get(ERROR_FILE):
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"exit_code": error.exit_code, "error": str(error)}, file)


class Problem(NamedTuple):
    """One line for the user, and the flags that it concerns.

    A problem is left out if one of its flags was already reported, because it only follows from the first one.
    """

    flags: tuple[str, ...]
    text: str
