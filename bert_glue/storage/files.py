"""Writes files so that nobody ever reads half of one, and reads JSON files with errors that name the file.

A link is replaced by the file and never followed, because an output folder may come from a stranger, and the targets of
its links are not ours.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bert_glue.errors import CheckpointError, MachineError
from bert_glue.result_keys import wrong_value

# Files of a run's output folder; users and harnesses rely on these names.
RESULTS_FILE = "all_results.json"
RECORD_FILE = "run.json"
ANALYSIS_FILE = "analysis.json"
STATE_FILE = "trainer_state.json"
_HASHED_BYTES = 1 << 20  # read and hashed at a time


_LARGEST_TEXT = 256 << 20  # bytes; parsed, JSON takes about ten times as much


def open_plain(path: Path) -> BinaryIO:
    """A regular file to read: opening a pipe would wait for its writer, and a device may never end.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", str(path))


def is_inside(file: Path, folder: Path) -> bool:
    """True unless a link leads from `file` out of `folder`; into its own blobs, where the hub's cache keeps it, is in.

    A model folder may come from a stranger, and what its links name on this machine is not the stranger's to publish.
    """
    real, home = file.resolve(), folder.resolve()
    return real.is_relative_to(home) or real.parent == home.parent.parent / "blobs"


def read_plain_text(path: Path, most: int = _LARGEST_TEXT, encoding: str = "utf-8") -> str:
    """The text of a regular file of at most `most` bytes.

    Raises:
        OSError: the file is not a regular file, or cannot be read.
        ValueError: the file is larger, or is not text in `encoding`.
    """
    with open_plain(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return content.decode(encoding)


def file_hash(path: Path, algorithm: str = "sha256", header: bytes = b"") -> str:
    """The hash of a file's content, behind `header`, hexadecimal.

    Args:
        algorithm: of hashlib.
    """
    digest = hashlib.new(algorithm, header)
    with open_plain(path) as file:  # hashlib.file_digest needs Python 3.11
        while block := file.read(_HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def plain_errors(target: Path) -> Iterator[None]:
    """Turn an error of the file system while writing `target` into one line with exit code 6.

    Raises:
        CheckpointError: the block raises OSError, or the error into which safetensors turns one.
    """
    from safetensors import SafetensorError  # here: launchers read results with the standard library alone

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def read_results(output_dir: Path) -> dict[str, Any]:
    """Read the `all_results.json` of a run.

    Raises:
        MachineError: the file is missing, is not a JSON object, or has a value of the wrong kind for its key.
    """
    results = read_json_object(output_dir / RESULTS_FILE)
    wrong = wrong_value(results)
    if wrong:
        raise MachineError(f"{output_dir / RESULTS_FILE}: not written by this program: {wrong}")
    return results


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a results file of a run.

    Raises:
        MachineError: the file is missing or is not a JSON object.
    """
    try:
        return json_object(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MachineError(f"{file}: no results of a finished run ({reason})") from error


def json_text(content: dict) -> str:
    """The text of a JSON file.

    Raises:
        ValueError: a number is not finite; JSON cannot represent it.
    """
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file so that nobody ever reads half of it."""
    write_whole(path, json_text(content))


_LFS_POINTER = b"version https://git-lfs"


def is_lfs_pointer(start: bytes) -> bool:
    """Whether the beginning of a file shows a Git-LFS pointer instead of the real file."""
    return start.startswith(_LFS_POINTER)


def check_not_lfs_pointer(path: Path) -> None:
    """Refuse a Git-LFS pointer in the place of a file.

    Raises:
        MachineError: `path` is a pointer (the message says how to get the file), or it cannot be read.
    """
    try:
        with open_plain(path) as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror}") from error
    if is_lfs_pointer(start):
        raise MachineError(
            f"{path} is a Git-LFS pointer ({path.stat().st_size} bytes), not the file itself: "
            "run `git lfs install && git lfs pull` in that folder, or download the file"
        )


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Write `path` through a temporary file and one rename; an earlier file stays until the new one is complete.

    Yields:
        The path to write to, an empty file of this process.

    Raises:
        OSError: the file cannot be written; no temporary file remains.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        aside.open("xb").close()  # never opens what a link points to
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path` as `written_aside` does.

    Characters that are not text, such as the bytes of a path that the locale cannot decode, are escaped as in JSON.

    Raises:
        OSError: the file cannot be written; no temporary file remains.
    """
    with written_aside(path) as aside:
        aside.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


# The temporary files of `written_aside` in a killed process: a dot, the name of a results file, a dot, a process id.
_ABANDONED = re.compile(r"\..+\.(?:json|txt|tsv|csv|md|html|png|log)\.(\d{1,10})")


def remove_abandoned(folder: Path) -> None:
    """Delete the temporary files of killed processes in `folder`; the caller must hold its lock.

    Raises:
        OSError: the file system failed.
    """
    for path in folder.glob(".*"):
        found = _ABANDONED.fullmatch(path.name)
        if found and path.is_file() and not path.is_symlink() and not _is_alive(int(found[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def open_own(path: Path) -> BinaryIO:
    """Open a file to read and append; create it if it is missing.

    Raises:
        OSError: it is a link, has a second name (a hard link), is not a regular file, or cannot be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise OSError(errno.ELOOP, "it is a link or no regular file: remove it", str(path))
    return os.fdopen(handle, "a+b")


def make_own_folder(path: Path) -> None:
    """Creates a folder inside an output folder of this program.

    Raises:
        OSError: it is a link, or it cannot be created.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link: remove it", str(path))
    path.mkdir(parents=True, exist_ok=True)


def json_object(path: Path) -> dict[str, Any]:
    """Read a file that is one JSON object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, is nested too deeply, is not an object, or is larger than 256 MiB.
    """
    try:
        content = json.loads(read_plain_text(path))
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


# Spreadsheets run a cell with such a beginning (OWASP, "CSV injection"); Asian keyboards type the wide forms.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def without_formula(text: str) -> str:
    """A cell that a spreadsheet shows and does not run: an apostrophe precedes a formula that is not a number."""
    if not text.startswith(_FORMULA_STARTS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


_LINE_ENDS = str.maketrans({c: c.encode("unicode_escape").decode() for c in "\\\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"})


def one_line(text: str) -> str:
    """A text for a format without quoting, with backslashes, tabs and line ends escaped as in Python."""
    return text.translate(_LINE_ENDS)


def cache_folder() -> Path:
    """The folder of tokenized splits: $BERT_GLUE_CACHE, else in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("BERT_GLUE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "bert_glue"
