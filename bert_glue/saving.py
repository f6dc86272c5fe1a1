"""Checkpoints are written by a thread: training waits only while its state is copied to host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

from bert_glue.errors import UserError


class Saver:
    """Runs one job at a time in a thread. As a context it waits for the last one.

    An error of a job is raised by the next call of any method here, so it ends the run no later than the
    next optimizer step.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin `job`, after the one before it."""
        self.wait()
        # A daemon: a second signal ends the process at once, and what is half written is cleared later.
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True, name="checkpoint")
        self._thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Until no job is running."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of the last job, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, SystemExit):  # a second signal does not wait
            try:
                self.wait()  # what was sound when it was begun shall be there whole
            except UserError as second:
                if isinstance(error, UserError) and error is not second:
                    error.args = (f"{error}\n{second}",)
