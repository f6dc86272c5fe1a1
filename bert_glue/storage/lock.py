"""One run at a time in an output folder, and one process at a time at a piece of work that all would do alike."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bert_glue.errors import CheckpointError
from bert_glue.storage.files import open_own, open_plain


class FolderLock:
    """Locks `folder` for this process while its block runs; the kernel releases the lock however the process ends.

    Args:
        folder: the folder; created if it does not exist.
        is_holder: False does nothing, because one rank holds the lock for all.

    Attributes:
        note: a line for the user where the file system has no locks, else "".

    Raises:
        CheckpointError: another run holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: Path, is_holder: bool = True):
        self.folder, self.is_holder = folder, is_holder
        self.note = ""
        self._file: BinaryIO | None = None

    def __enter__(self) -> FolderLock:
        if not self.is_holder:
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open_own(self.folder / ".lock")
            self._take()
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"{error.filename or self.folder} cannot be written: {error.strerror}") from error
        return self

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read(200).decode(errors="replace").strip() or "not known which"
            raise CheckpointError(
                f"--output_dir {self.folder}: another run ({holder}) is writing there; choose another folder"
            ) from error
        except OSError as error:  # some cluster file systems have locks only with a mount option
            self.note = f"no file locks in {self.folder} ({error.strerror}): start no second run there"

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """A context that waits until no other process is in it with the same `file`, an empty file that stays.

    Where the folder cannot be written or has no locks, all processes are in it at once.
    """
    held = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = open_own(file)
        fcntl.flock(held, fcntl.LOCK_EX)
    except OSError:  # what the lock spares is time alone
        pass
    try:
        yield
    finally:
        if held is not None:
            held.close()


def wait_until_free(folders: list[Path], seconds: float) -> None:
    """Wait until no process holds any of the folders.

    Raises:
        CheckpointError: a folder is still locked after `seconds`.
    """
    until = time.monotonic() + seconds
    for folder in folders:
        while _is_held(folder):
            if time.monotonic() > until:
                raise CheckpointError(f"{folder}: another run is still writing there")
            time.sleep(0.1)


def _is_held(folder: Path) -> bool:
    try:
        with open_plain(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock yet
        return False
    return False
