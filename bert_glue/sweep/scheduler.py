"""The queue of a sweep: fills the places of an executor, retries a failed run once, and stops all runs together."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bert_glue.launch.ranks import last_lines
from bert_glue.result_keys import headline_keys
from bert_glue.storage.files import json_object
from bert_glue.sweep.executors.child import ERROR_NAME, LOG_FILE
from bert_glue.sweep.executors.interface import Event, EventKind, Executor, Job
from bert_glue.sweep.plan import SweepRun

_SHOWN_CHARACTERS = 200
_POLL_SECONDS = 0.2
_USAGE, _MACHINE = 2, 4
_ATTEMPTS = 2
_LOSSES = 5  # of places under one run; more often it is the run that takes its host down


class Source(Protocol):
    """Supplies runs: a list, or a search that chooses the next run by the results so far."""

    def next_run(self) -> SweepRun | None:
        """The next run to start. None if there is none at present."""

    def ended(self, run: SweepRun, is_done: bool) -> None:
        """Called when a run is finished or has failed for the last time."""


@dataclass
class Queue:
    """Submits runs to an executor until the source has no more.

    Args:
        source: supplies the runs.
        executor: runs them.
        grace: seconds that a run has to save its checkpoint after a signal, before it is killed.
        tell: called with each event.
        show: called a few times per second with the jobs that have not ended.
        stop_signal: the first signal that was received.
        failures: folder -> reason of the last failure.
        codes: folder -> exit code of the last failure.
        running: the jobs that have not ended.
    """

    source: Source
    executor: Executor
    grace: float
    tell: Callable[[Event], None]
    show: Callable[[list[Job]], None]
    stop_signal: int | None = None
    failures: dict[Path, str] = field(default_factory=dict)
    codes: dict[Path, int] = field(default_factory=dict)
    running: list[Job] = field(default_factory=list)
    _again: list[tuple[SweepRun, int]] = field(default_factory=list)
    _losses: dict[Path, int] = field(default_factory=dict)
    _signals: int = 0

    def run(self) -> None:
        """Runs until all runs are finished, or until a signal has ended them.

        Raises:
            MachineError: the source or the executor has lost its database or its cluster. The runs have saved.
        """
        with self._signals_caught():
            try:
                while self._submit_what_fits() or self.running:
                    self._poll()
            except Exception:  # raised by the source or the executor: the runs can still save
                self._signals, self.stop_signal = self._signals or 1, self.stop_signal or signal.SIGTERM
                while self.running:
                    self._poll()
                raise
            finally:
                if self.running:
                    self._kill()

    @contextmanager
    def _signals_caught(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1
        self.stop_signal = self.stop_signal or number

    def _submit_what_fits(self) -> bool:
        """Submits runs while there are places for them. False if none was submitted."""
        jobs: list[Job] = []
        free = 0 if self._signals else self.executor.free()
        while len(jobs) < free and (following := self._next()) is not None:
            jobs.append(Job(*following, is_resumed=following[0].is_started()))
        if jobs:
            self.executor.submit(jobs)
            self.running += jobs
            self._settle()
        return bool(jobs)

    def _next(self) -> tuple[SweepRun, int] | None:
        run = self.source.next_run()
        if run is not None:
            return run, 1
        return self._again.pop(0) if self._again else None

    def _poll(self) -> None:
        time.sleep(_POLL_SECONDS)
        self.executor.poll(self.running)
        self._settle()
        if self._signals:
            self._stop_all()
        self.show(self.running)

    def _settle(self) -> None:
        """Tells what has happened to the jobs, and takes out those that have ended."""
        for job in list(self.running):
            self._tell_events(job)
            if job.code is not None:
                self.running.remove(job)
                self._ended(job, job.code)

    def _tell_events(self, job: Job) -> None:
        while job.events:
            self.tell(job.events.pop(0))

    def _ended(self, job: Job, code: int) -> None:
        run = job.run
        self.executor.collect(job)
        self._tell_events(job)
        results = run.results() if code == 0 else None
        if results is not None:
            self._tell(EventKind.DONE, f"done {run.name} in {job.seconds:.0f} s: {_score(run, results)}")
            self.source.ended(run, True)
        elif self._signals:
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            self._tell(EventKind.STOPPED, f"stopped {run.name} ({how})")
        elif job.is_lost and self._losses.get(run.folder, 0) < _LOSSES:
            self._losses[run.folder] = self._losses.get(run.folder, 0) + 1
            self._again.append((run, job.number))
            self._tell(EventKind.DEVICE_LOST, f"lost {run.name}: {job.reason}; it will be continued")
        elif code == _MACHINE and self.executor.leave_out(job):
            # Without this, one missing device would use up the attempts of all runs while the other devices work.
            self._again.append((run, job.number))
            self._tell(EventKind.DEVICE_LOST, f"no more runs on {job.place}: {_reason(run)}")
        else:
            self._failed(run, job.number, job.reason or _why(code, run), code if code > 0 else 1)

    def _failed(self, run: SweepRun, number: int, reason: str, code: int) -> None:
        if number < _ATTEMPTS and code != _USAGE:
            self._tell(EventKind.RETRIED, f"failed {run.name}: {reason}; it will be retried once at the end")
            self._again.append((run, number + 1))
            return
        self._tell(EventKind.FAILED, f"failed {run.name}: {reason}; its output: {run.folder / LOG_FILE}")
        self.failures[run.folder], self.codes[run.folder] = reason, code
        self.source.ended(run, False)

    def _stop_all(self) -> None:
        """Forwards each signal once, and kills the runs that are still there after `grace` seconds.

        Jobs that outlive this process are left alone: they go on, and the next sweep finds them.
        """
        if self.running and self.executor.outlives_driver:
            text = f"signal {self.stop_signal}: this program leaves {len(self.running)} runs, which go on"
            self._tell(EventKind.SIGNAL, text)
            self.running.clear()
        if self.running and not hasattr(self, "_deadline"):
            self._deadline, self._handed_on = time.monotonic() + self.grace, 0
            text = f"signal {self.stop_signal}: {len(self.running)} runs save their checkpoints"
            self._tell(EventKind.SIGNAL, text)
        while self.running and self._handed_on < self._signals:
            self._handed_on += 1
            # run_glue.py saves at SIGINT and SIGTERM wherever it runs.
            is_known = self.stop_signal in (signal.SIGINT, signal.SIGTERM)
            self.executor.cancel(self.running, self.stop_signal if is_known else signal.SIGTERM)
        if self.running and time.monotonic() > self._deadline:
            text = f"{len(self.running)} runs did not end within {self.grace:g} s (--grace) and are killed"
            self._tell(EventKind.NOT_ENDED, text)
            self._kill()

    def _tell(self, kind: EventKind, text: str) -> None:
        self.tell(Event(kind, text))

    def _kill(self) -> None:
        """Kills all jobs. One that cannot be killed is named and given up."""
        self.executor.cancel(self.running, signal.SIGKILL)
        for job in self.running:
            self._tell_events(job)
        self.running[:] = [job for job in self.running if job.code is None]


def _score(run: SweepRun, results: dict[str, Any]) -> str:
    value = results[headline_keys(run.task)[0]]
    return f"{run.task.headline} " + ("has no value" if value is None else f"{100 * value:.2f}")


def _why(code: int, run: SweepRun) -> str:
    if code == 0:
        return "it ended with exit code 0 but left no complete results"
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{hint}"
    return f"exit code {code}: {_reason(run)}"


def _reason(run: SweepRun) -> str:
    """The error that ended a run, from its error file; else the last line of its log."""
    try:
        return f"error: {json_object(run.folder / ERROR_NAME)['error']}".splitlines()[0][:_SHOWN_CHARACTERS]
    except (OSError, ValueError, KeyError):
        return last_line(run)


def last_line(run: SweepRun) -> str:
    """The last line of a run's log that is not blank, up to 200 characters."""
    return (last_lines(run.folder / LOG_FILE, 1) or ["no output"])[0].strip()[:_SHOWN_CHARACTERS]
