"""Runs child processes, one per slot: retries a failed run once, stops all together, and outlives their crashes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, Protocol

from bert_glue.errors import ERROR_FILE
from bert_glue.launch.ranks import kill_group, last_lines, signalled_with_parent
from bert_glue.result_keys import headline_keys
from bert_glue.storage.files import json_object, open_own
from bert_glue.sweep.plan import SweepRun

RUN_GLUE = Path(__file__).resolve().parents[2] / "run_glue.py"
LOG_FILE = "run.log"
_ERROR_NAME = "error.json"
_SHOWN_CHARACTERS = 200
_POLL_SECONDS = 0.2
_KILLED_SECONDS = 10.0
_USAGE, _MACHINE = 2, 4
_ATTEMPTS = 2


class Source(Protocol):
    """Supplies runs: a list, or a search that chooses the next run by the results so far."""

    def next_run(self) -> SweepRun | None:
        """The next run to start. None if there is none at present."""

    def ended(self, run: SweepRun, is_done: bool) -> None:
        """Called when a run is finished or has failed for the last time."""


@dataclass
class Slot:
    """Holds one run at a time.

    Args:
        device: the value of `--device`.
        threads: OMP_NUM_THREADS of its run. 0 keeps the user's value.
        finished: how many runs have succeeded here.
    """

    device: str
    threads: int = 0
    finished: int = 0


@dataclass
class Attempt:
    """A run that occupies a slot.

    Args:
        number: 1 for the first attempt of this sweep command.
        began: start time in monotonic seconds.
    """

    run: SweepRun
    slot: Slot
    number: int
    process: subprocess.Popen
    began: float

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began


class EventKind(Enum):
    """Kinds of events of a run, a device or the sweep."""

    STARTED = auto()
    DONE = auto()
    STOPPED = auto()
    RETRIED = auto()
    FAILED = auto()
    DEVICE_LOST = auto()
    SIGNAL = auto()
    NOT_ENDED = auto()


@dataclass(frozen=True)
class Event:
    """One event. `text` is its log line."""

    kind: EventKind
    text: str


@dataclass
class Queue:
    """Starts runs in free slots until the source has no more.

    Args:
        source: supplies the runs.
        slots: the slots of all devices. A device that fails loses its slot.
        grace: seconds that a run has to save its checkpoint after a signal, before it is killed.
        tell: called with each event.
        show: called a few times per second with the running attempts.
        stop_signal: the first signal that was received.
        failures: folder -> reason of the last failure.
        codes: folder -> exit code of the last failure.
        running: the attempts that occupy a slot.
    """

    source: Source
    slots: list[Slot]
    grace: float
    tell: Callable[[Event], None]
    show: Callable[[list[Attempt]], None]
    stop_signal: int | None = None
    failures: dict[Path, str] = field(default_factory=dict)
    codes: dict[Path, int] = field(default_factory=dict)
    running: list[Attempt] = field(default_factory=list)
    _again: list[tuple[SweepRun, int]] = field(default_factory=list)
    _signals: int = 0

    def run(self) -> None:
        """Runs until all runs are finished, or until a signal has ended them."""
        with self._signals_caught():
            try:
                while self._start_what_fits() or self.running:
                    self._poll()
            except Exception:  # raised by the source, e.g. its database is lost: the runs can still save
                self._signals, self.stop_signal = self._signals or 1, self.stop_signal or signal.SIGTERM
                while self.running:
                    self._poll()
                raise
            finally:
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

    def _start_what_fits(self) -> bool:
        """Starts runs in free slots. False if no run was started and none is left."""
        started = False
        busy = [attempt.slot for attempt in self.running]
        for slot in [slot for slot in self.slots if not any(slot is other for other in busy)]:
            following = None if self._signals else self._next()
            if following is None:
                break
            started = self._start(*following, slot) or started
        return started or bool(self._again and not self._signals)

    def _next(self) -> tuple[SweepRun, int] | None:
        run = self.source.next_run()
        if run is not None:
            return run, 1
        return self._again.pop(0) if self._again else None

    def _start(self, run: SweepRun, number: int, slot: Slot) -> bool:
        resume = ["--resume_from_checkpoint=auto"] if run.is_started() else []
        command = [sys.executable, str(RUN_GLUE), *run.flags, f"--device={slot.device}", "--disable_tqdm", *resume]
        threads = str(slot.threads)
        own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if slot.threads else {}
        own["WORLD_SIZE"] = "1"  # each run is alone, even if srun started this sweep on several hosts
        try:
            run.note_settings()
            (run.folder / _ERROR_NAME).unlink(missing_ok=True)
            with open_own(run.folder / LOG_FILE) as log:
                log.write(os.fsencode(f"\n$ {shlex.join(command)}\n"))
                log.flush()
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", ERROR_FILE: str(run.folder / _ERROR_NAME), **own},
                    start_new_session=True, preexec_fn=signalled_with_parent(signal.SIGTERM),
                )  # fmt: skip
        except OSError as error:
            self._failed(run, number, f"the process cannot be started: {error}", 6)
            return False
        self.running.append(Attempt(run, slot, number, process, time.monotonic()))
        self._tell(EventKind.STARTED, f"{'continue' if resume else 'start'} {run.name} on {slot.device}")
        return True

    def _poll(self) -> None:
        time.sleep(_POLL_SECONDS)
        for attempt in [attempt for attempt in self.running if attempt.process.poll() is not None]:
            self.running.remove(attempt)
            self._ended(attempt)
        if self._signals:
            self._stop_all()
        self.show(self.running)

    def _ended(self, attempt: Attempt) -> None:
        run, code = attempt.run, attempt.process.returncode
        kill_group(attempt.process.pid)  # ends child processes that the run left behind
        results = run.results() if code == 0 else None
        if results is not None:
            attempt.slot.finished += 1
            self._tell(EventKind.DONE, f"done {run.name} in {attempt.seconds:.0f} s: {_score(run, results)}")
            self.source.ended(run, True)
        elif self._signals:
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            self._tell(EventKind.STOPPED, f"stopped {run.name} ({how})")
        elif code == _MACHINE and not attempt.slot.finished and len(self.slots) > 1:
            # Without this, one missing device would use up the attempts of all runs while the other devices work.
            self.slots[:] = [slot for slot in self.slots if slot is not attempt.slot]
            self._again.append((run, attempt.number))
            self._tell(EventKind.DEVICE_LOST, f"no more runs on {attempt.slot.device}: {_reason(run)}")
        else:
            self._failed(run, attempt.number, _why(code, run), code if code > 0 else 1)

    def _failed(self, run: SweepRun, number: int, reason: str, code: int) -> None:
        if number < _ATTEMPTS and code != _USAGE:
            self._tell(EventKind.RETRIED, f"failed {run.name}: {reason}; it will be retried once at the end")
            self._again.append((run, number + 1))
            return
        self._tell(EventKind.FAILED, f"failed {run.name}: {reason}; its output: {run.folder / LOG_FILE}")
        self.failures[run.folder], self.codes[run.folder] = reason, code
        self.source.ended(run, False)

    def _stop_all(self) -> None:
        """Forwards each signal once, and kills the runs that are still there after `grace` seconds."""
        if self.running and not hasattr(self, "_deadline"):
            self._deadline, self._handed_on = time.monotonic() + self.grace, 0
            text = f"signal {self.stop_signal}: {len(self.running)} runs save their checkpoints"
            self._tell(EventKind.SIGNAL, text)
        while self.running and self._handed_on < self._signals:
            self._handed_on += 1
            for attempt in self.running:
                # run_glue.py saves only at SIGINT and SIGTERM.
                is_known = self.stop_signal in (signal.SIGINT, signal.SIGTERM)
                attempt.process.send_signal(self.stop_signal if is_known else signal.SIGTERM)
        if self.running and time.monotonic() > self._deadline:
            text = f"{len(self.running)} runs did not end within {self.grace:g} s (--grace) and are killed"
            self._tell(EventKind.NOT_ENDED, text)
            self._kill()

    def _tell(self, kind: EventKind, text: str) -> None:
        self.tell(Event(kind, text))

    def _kill(self) -> None:
        for attempt in self.running:
            kill_group(attempt.process.pid)
        for attempt in list(self.running):
            try:
                attempt.process.wait(_KILLED_SECONDS)
            except subprocess.TimeoutExpired:  # stuck in a driver call, which no signal interrupts
                text = f"process {attempt.process.pid} of {attempt.run.name} cannot be killed"
                self._tell(EventKind.NOT_ENDED, text)
                self.running.remove(attempt)


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
        return f"error: {json_object(run.folder / _ERROR_NAME)['error']}".splitlines()[0][:_SHOWN_CHARACTERS]
    except (OSError, ValueError, KeyError):
        return last_line(run)


def last_line(run: SweepRun) -> str:
    """The last line of a run's log that is not blank, up to 200 characters."""
    return (last_lines(run.folder / LOG_FILE, 1) or ["no output"])[0].strip()[:_SHOWN_CHARACTERS]
