"""What a person sees while training: a bar on a terminal, plain lines elsewhere; and signals that ask to stop."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bert_glue.result_keys import is_measured

if TYPE_CHECKING:
    from bert_glue.collapse import CollapseWatch
    from bert_glue.trackers import Trackers

# A terminal and a launcher both pass one Ctrl-C on, and so do some schedulers with SIGTERM.
_SAME_SIGNAL_SECONDS = 2.0


@dataclass
class Progress:
    """Where a run is; all of it goes into a checkpoint.

    Args:
        step: optimizer steps done, skipped ones included.
        updates: optimizer steps that changed weights: the schedule's clock.
        forward_passes: micro-batches done, the address of dropout masks.
        samples: consumed by all ranks.
        loss_sum: sum of the losses of all steps up to the last log line.
        recent_loss, recent_steps: the same of the steps since then, as of the checkpoint.
        history: log lines: step, epoch, loss, learning_rate, grad_norm, loss_scale or eval_*.
        evaluated_step: of the last evaluation that ran to its end.
        changes: settings that were changed by a resume, a line each.
    """

    step: int = 0
    updates: int = 0
    forward_passes: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    recent_loss: float = 0.0
    recent_steps: int = 0
    best_metric: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    history: list[dict] = field(default_factory=list)
    evaluated_step: int = 0
    changes: list[str] = field(default_factory=list)


class ProgressLog:
    """Console of one run; silent on all ranks but the first.

    Args:
        is_first: whether this rank prints.
        wants_bar: False with `--disable_tqdm`.
        watches_signals: True turns SIGTERM and SIGINT into a request that the loop reads.
        trackers: get every entry too.

    `ends_at_once` is True until training begins: before that there is nothing to save. `watch` is asked for
    warnings at each entry.
    """

    def __init__(self, is_first: bool, wants_bar: bool, watches_signals: bool = True, trackers: Trackers | None = None):
        self.trackers = trackers
        self.is_first = is_first
        self.wants_bar = wants_bar and is_first and sys.stderr.isatty()
        self.watches_signals = watches_signals
        self.stop_signal: int | None = None
        self.ends_at_once = True
        self.watch: CollapseWatch | None = None
        self._signalled = 0.0
        self._bar: Any = None
        self._task: Any = None
        if watches_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: object) -> None:
        """First signal: finish the step, or leave the evaluation, and save. A later one: end at once."""
        is_again = self.stop_signal is not None and time.monotonic() - self._signalled > _SAME_SIGNAL_SECONDS
        if self.ends_at_once or is_again:
            raise SystemExit(128 + number)
        if self.stop_signal is None:
            self.stop_signal, self._signalled = number, time.monotonic()

    def ignore_signals(self) -> None:
        """Nothing is left to stop: a launcher that clears up must not change the exit code."""
        if self.watches_signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                # Not SIG_IGN, which a process started from here would inherit.
                signal.signal(number, lambda *_: None)

    def stop_asked(self) -> bool:
        """True once a signal asked this rank to stop."""
        return self.stop_signal is not None

    def line(self, text: str) -> None:
        """One line of the log."""
        if self.is_first:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

    def entry(self, entry: dict) -> None:
        """One log entry, numbers shortened."""
        if self.trackers is not None:
            self.trackers.log(entry, entry["step"])
            for problem in self.trackers.problems():
                self.line(f"note: {problem}")
        parts = []
        for name, value in entry.items():
            if isinstance(value, float):
                value = f"{value:.3e}" if name == "learning_rate" else f"{value:.5g}"
            parts.append(f"{name}={value}")
        for text in (" ".join(parts), *(self.watch.see(entry) if self.watch else ())):
            self.line(text)

    def results(self, results: dict, step: int) -> None:
        """The results for the trackers: `all_results.json` without what says how the run was made."""
        if self.trackers is not None:
            told = {n: v for n, v in results.items() if is_measured(n)}
            self.trackers.log(told, step)

    def advance(self, step: int, total: int, epoch: float) -> None:
        """Move the bar."""
        if not self.wants_bar:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f} epoch {task.fields[epoch]:.2f}"),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total, epoch=epoch)
            self._bar.start()
        self._bar.update(self._task, completed=step, epoch=epoch)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
