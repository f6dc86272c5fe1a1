"""What the scheduler asks of an executor, which starts runs somewhere: on this host, in a Ray cluster, as Slurm jobs.

The scheduler decides which run comes next, what is retried, and when everything stops. An executor knows places and
nothing of the sweep. The four calls are `submit`, `poll`, `cancel` and `collect`. Events reach the user through
`Job.events`, so that an executor never prints.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any, Protocol

from bert_glue.sweep.plan import SweepRun


class EventKind(Enum):
    """Kinds of events of a run, a device or the sweep."""

    STARTED = auto()
    DONE = auto()
    STOPPED = auto()
    RETRIED = auto()
    FAILED = auto()
    DEVICE_LOST = auto()
    PREEMPTED = auto()
    SIGNAL = auto()
    NOT_ENDED = auto()
    NOTE = auto()


@dataclass(frozen=True)
class Event:
    """One event. `text` is its log line."""

    kind: EventKind
    text: str


@dataclass
class Job:
    """One attempt of a run, from its submission to its end.

    Args:
        run: the run.
        number: 1 for the first attempt of this sweep command.
        is_resumed: an earlier attempt may have left a checkpoint.
        place: the device or host where it runs; "" while it waits for one.
        began: start time in monotonic seconds; None while it waits.
        code: the exit code of its process, -N if signal N ended it; None until it has ended.
        reason: why it ended, where neither the code nor the run's log says it.
        is_lost: its place failed and not the run, so the attempt does not count.
        handle: what the executor knows it by.
        events: what the executor has to tell the user; the scheduler empties the list.
    """

    run: SweepRun
    number: int
    is_resumed: bool = False
    place: str = ""
    began: float | None = None
    code: int | None = None
    reason: str = ""
    is_lost: bool = False
    handle: Any = None
    events: list[Event] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds since the start; 0 while it waits."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def starts(self, place: str) -> None:
        """Notes that its process has started at `place`."""
        self.place, self.began = place, time.monotonic()
        self.tell(EventKind.STARTED, f"{'continue' if self.is_resumed else 'start'} {self.run.name} on {place}")

    def ends(self, code: int, reason: str = "", is_lost: bool = False) -> None:
        """Notes that it has ended; see the attributes."""
        self.code, self.reason, self.is_lost = code, reason, is_lost

    def tell(self, kind: EventKind, text: str) -> None:
        """Adds an event."""
        self.events.append(Event(kind, text))


class Executor(Protocol):
    """Runs jobs somewhere. No call waits longer than its own bound, and none raises for a job that fails.

    Attributes:
        where: the places, for the first line of the sweep, such as "cpu, cpu"; known once it is open.
        outlives_driver: jobs go on when this process ends, and a later `submit` of the same run finds them.
    """

    where: str
    outlives_driver: bool

    def open(self, folder: Path) -> None:
        """Connects, and checks that there are places for runs. Called once, before anything else.

        Args:
            folder: the output folder of the sweep, which this process has locked.

        Raises:
            MachineError: there is no answer within the executor's bound, or no place that can take a run.
        """

    def free(self) -> int:
        """How many more jobs may be submitted now.

        Raises:
            MachineError: no place is left, or the cluster does not answer.
        """

    def submit(self, jobs: list[Job]) -> None:
        """Takes jobs, at most `free()`. A job that cannot be submitted ends with a code and a reason.

        Raises:
            MachineError: the cluster refuses all of them.
        """

    def poll(self, jobs: list[Job]) -> None:
        """Brings the fields of submitted jobs up to date: where they run, and the code with which they ended.

        Raises:
            MachineError: the cluster does not answer.
        """

    def cancel(self, jobs: list[Job], number: int) -> None:
        """Sends a signal to jobs. SIGINT and SIGTERM let a run save its checkpoint; SIGKILL ends it."""

    def collect(self, job: Job) -> None:
        """Completes the folder of an ended job on this host, and frees what the job still holds."""

    def leave_out(self, job: Job) -> bool:
        """Gives no more jobs to the place of an ended job, because it cannot run any. False if no other place is left,
        or if it has worked before."""

    def close(self) -> None:
        """Gives back what the executor holds. Jobs that outlive the driver go on."""
