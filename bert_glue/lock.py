"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from bert_glue.errors import CheckpointError


class FolderLock:
    """Holds `folder` for this process while its block runs; the kernel frees it however the process ends.

    Args:
        folder: made if it does not exist.
        is_holder: False does nothing: one rank holds the folder for all.

    Raises:
        CheckpointError: another run holds it, or it cannot be written.
    """

    def __init__(self, folder: Path, is_holder: bool = True):
        self.folder, self.is_holder = folder, is_holder
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        if not self.is_holder:
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"--output_dir {self.folder} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            raise CheckpointError(
                f"--output_dir {self.folder}: another run (process {holder}) is writing there; choose another folder"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
