"""What a person sees of a running sweep: a live table on a terminal, one line an event elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from bert_glue.sweep_queue import Attempt, Event, EventKind, last_words

_REFRESH_SECONDS = 1.0


class SweepTable:
    """Events and the state of every slot.

    Args:
        total: runs of the sweep; None in a search, which has no fixed number.
        done: of them finished earlier.
        is_live: None asks whether stderr is a terminal.
    """

    def __init__(self, total: int | None, done: int = 0, is_live: bool | None = None):
        self.total, self.done, self.failed = total, done, 0
        self._live: Any = None
        self._shown = 0.0
        if sys.stderr.isatty() if is_live is None else is_live:
            from rich.console import Console
            from rich.live import Live

            # No thread of its own: the queue forks.
            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()

    def tell(self, event: Event) -> None:
        """Count and print one event."""
        self.done += event.kind is EventKind.DONE
        self.failed += event.kind is EventKind.FAILED
        of_all = "" if self.total is None else f"[{self.done}/{self.total}] "
        if self._live is None:
            print(f"{of_all}{event.text}", flush=True)
        else:
            self._live.console.print(f"{of_all}{event.text}", markup=False, highlight=False)

    def show(self, running: list[Attempt]) -> None:
        """Draw the table anew, once a second at most."""
        if self._live is None or time.monotonic() - self._shown < _REFRESH_SECONDS:
            return
        from rich.table import Table

        self._shown = time.monotonic()
        of_all = "" if self.total is None else f" of {self.total}"
        table = Table("device", "run", "seconds", "last line", title=f"{self.done}{of_all} done, {self.failed} failed")
        for attempt in running:
            name = attempt.run.name if attempt.number == 1 else f"{attempt.run.name} (again)"
            table.add_row(attempt.slot.device, name, f"{attempt.seconds:.0f}", last_words(attempt.run)[:70])
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.update("", refresh=True)
            self._live.stop()
            self._live = None
