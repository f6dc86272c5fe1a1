"""How files of ours are written: whole or not at all, and never through a link that someone else left there.

A link is replaced by the file, never followed: an output folder may come from a stranger, and what its links
point to is not ours.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give `path` its content by one rename; a file there before stays until this one is whole.

    Yields:
        The path to write to, an empty file of this process.

    Raises:
        OSError: it cannot be written; nothing is left aside.
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

    Raises:
        OSError: it cannot be written; nothing is left aside.
    """
    with written_aside(path) as aside:
        aside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def open_own(path: Path) -> BinaryIO:
    """A file to read and append to, made if it is missing.

    Raises:
        OSError: it is a link, has a second name (a hard link), is no regular file, or cannot be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise OSError(errno.ELOOP, "it is a link or no regular file: remove it", str(path))
    return os.fdopen(handle, "a+b")


def make_own_folder(path: Path) -> None:
    """Make a folder below one of ours.

    Raises:
        OSError: it is a link, or cannot be made.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link: remove it", str(path))
    path.mkdir(parents=True, exist_ok=True)


def json_object(path: Path) -> dict[str, Any]:
    """What a file holds that is one JSON object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, is nested too deeply, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content
