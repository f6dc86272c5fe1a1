"""`--executor local`: runs are child processes of the sweep, one per slot. They save and end with it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import FLAGS
from bert_glue.config.values import flag_value
from bert_glue.errors import CheckpointError, MachineError, UsageError
from bert_glue.launch.ranks import kill_group, python_path
from bert_glue.sweep.executors.child import Order, prepare, start
from bert_glue.sweep.executors.interface import EventKind, Job
from bert_glue.sweep.side_by_side import AUTO

_KILLED_SECONDS = 10.0
_LIST_SECONDS = 120  # a driver that hangs must not block the sweep


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
class _Process:
    slot: Slot
    process: subprocess.Popen


class LocalExecutor:
    """Child processes on the devices of this host. See `Executor`.

    Args:
        slots: the slots of all devices. A device that fails loses its slot.
    """

    outlives_driver = False

    def __init__(self, slots: list[Slot]):
        self.slots = slots
        self.where = ", ".join(slot.device for slot in slots)
        self._busy: list[Slot] = []

    def open(self, folder: Path) -> None:
        """Does nothing: this host is here."""

    def free(self) -> int:
        """The number of slots without a run."""
        return len(self._idle())

    def _idle(self) -> list[Slot]:
        return [slot for slot in self.slots if not any(slot is other for other in self._busy)]

    def submit(self, jobs: list[Job]) -> None:
        """Starts each job in a free slot."""
        for job in jobs:
            slot = self._idle()[0]
            order = Order(job.run.folder, job.run.flags, slot.device, slot.threads, job.is_resumed)
            try:
                prepare(job.run)
                job.handle = _Process(slot, start(order))
            except OSError as error:
                job.ends(CheckpointError.exit_code, f"the process cannot be started: {error}")
                continue
            self._busy.append(slot)
            job.starts(slot.device)

    def poll(self, jobs: list[Job]) -> None:
        """Reads the exit codes of the processes that have ended."""
        for job in jobs:
            job.code = job.handle.process.poll()

    def cancel(self, jobs: list[Job], number: int) -> None:
        """Sends the signal to each process; SIGKILL to all of its children too, and waits up to 10 s for their end."""
        if number != signal.SIGKILL:
            for job in jobs:
                job.handle.process.send_signal(number)
            return
        for job in jobs:
            kill_group(job.handle.process.pid)
        for job in jobs:
            process = job.handle.process
            try:
                process.wait(_KILLED_SECONDS)
            except subprocess.TimeoutExpired:  # stuck in a driver call, which no signal interrupts
                job.tell(EventKind.NOT_ENDED, f"process {process.pid} of {job.run.name} cannot be killed")
                job.ends(-signal.SIGKILL)

    def collect(self, job: Job) -> None:
        """Ends child processes that the run left behind, and frees its slot."""
        if job.handle is not None:
            kill_group(job.handle.process.pid)
            job.handle.slot.finished += job.code == 0
            self._busy = [slot for slot in self._busy if slot is not job.handle.slot]

    def leave_out(self, job: Job) -> bool:
        """Drops the slot of a device that has never worked, unless it is the last one."""
        slot = job.handle.slot
        if slot.finished or len(self.slots) == 1:
            return False
        self.slots[:] = [other for other in self.slots if other is not slot]
        return True

    def close(self) -> None:
        """Does nothing: the processes have ended."""


def slots_of(devices: str, jobs: int, listed: Callable[[], dict[str, Any]] | None = None) -> list[Slot]:
    """One slot per device and job, with its share of the host's threads.

    Raises:
        UsageError: a device name is unknown or given twice.
        MachineError: the devices of "auto" cannot be listed.
    """
    names = (listed or devices_here)()["devices"] if devices == AUTO else [name.strip() for name in devices.split(",")]
    for name in names:
        check_device(name)
    if len(set(names)) < len(names):
        raise UsageError(f"--devices {devices}: a device is given twice; --jobs N lets N runs share each device")
    names = names * jobs
    threads = 0 if "OMP_NUM_THREADS" in os.environ else max(1, len(os.sched_getaffinity(0)) // len(names))
    return [Slot(name, threads) for name in names]


def check_device(name: str) -> None:
    """Raises UsageError unless `name` may follow `--device`."""
    try:
        flag_value(FLAGS["device"], name)
    except ValueError as error:
        raise UsageError(f"--devices: {error}") from None


def devices_here() -> dict[str, Any]:
    """The `devices` of the best kind here, and the `free_bytes` of those that runs may share.

    Raises:
        MachineError: they cannot be listed.
    """
    # A separate process lists them, so that no driver state is forked into the runs.
    command = [sys.executable, "-m", "bert_glue.doctor.device_probe", "--list"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIST_SECONDS)
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"--devices auto: no answer within {_LIST_SECONDS} s; name the devices, or run python -m bert_glue.doctor"
        ) from None
    try:
        fact = json.loads(done.stdout)
        return {name: fact[name] for name in ("devices", "free_bytes")}
    except (ValueError, KeyError) as error:
        reason = re.sub(r"\s+", " ", (done.stderr or done.stdout).strip())[-300:]
        raise MachineError(f"--devices auto: {reason}; python -m bert_glue.doctor shows more") from error
