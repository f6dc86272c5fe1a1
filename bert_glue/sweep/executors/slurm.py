"""`--executor slurm`: each run is one task of a Slurm job array, by submitit. The sweep may leave and come back.

Runs and sweep share a file system. The folder of a run holds two small files: `slurm_job.json` has the job that the
sweep submitted, and `slurm_state.json` what the job says of itself. submitit also leaves a pickle of each result; it is
never read, because an output folder may come from somebody else.

Slurm announces a time limit and a preemption with SIGUSR1. The run saves, and the job is put back into Slurm's queue.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bert_glue.errors import CheckpointError, MachineError, UsageError, first_line
from bert_glue.launch.ranks import kill_group, python_path
from bert_glue.storage.files import json_object, write_json
from bert_glue.sweep.executors.child import Order, end, missing, order_of, prepare, start, wait
from bert_glue.sweep.executors.interface import EventKind, Job
from bert_glue.sweep.plan import SweepRun

JOB_FILE, STATE_FILE = "slurm_job.json", "slurm_state.json"
_SIGNAL = "USR1"
_FOLDER = "slurm"
_LOCAL = "local"
_MOST, _MOST_OF_SEARCH = 1000, 8  # MaxArraySize of Slurm is 1001 by default
_MINUTES, _SAVING_SECONDS = 240, 120
_POLL_SECONDS = {"slurm": 2.0, _LOCAL: 0.2}
_LAG_SECONDS = {"slurm": 60.0, _LOCAL: 2.0}  # until other hosts see a file that was written
_ANSWER_SECONDS = 60.0  # of Slurm's commands
_ENDED_BY_HOST = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED")
_KILL_WAIT_SECONDS = 60.0  # longer than Slurm's KillWait, 30 s by default
# Settings of submitit itself; all others are options of sbatch. NAME -> how its text is read.
_OF_SUBMITIT = {"array_parallelism": int, "signal_delay_s": int, "use_srun": lambda text: text.lower() != "false",
                "setup": lambda text: [text], "srun_args": str.split}  # fmt: skip
_OURS = ("nodes", "ntasks", "ntasks_per_node", "array", "output", "error", "signal", "open_mode", "chdir", "wait")


@dataclass
class Task:
    """What a job calls on its host: one run, from its start or from its last checkpoint.

    Args:
        order: the run.
        grace: seconds that the run has to save after SIGUSR1.
    """

    order: Order
    grace: float
    _process: subprocess.Popen | None = None
    _job: str = ""

    def __call__(self) -> int:
        """Runs until the end of the run and returns its exit code."""
        import submitit

        self._job = submitit.JobEnvironment().job_id
        cores = os.environ.get("SLURM_CPUS_PER_TASK", "0")
        threads = int(cores) if cores.isdecimal() and "OMP_NUM_THREADS" not in os.environ else 0
        # A job that Slurm itself put back finds the state of its first start.
        is_resumed = self.order.is_resumed or state_of(self.order.folder, self._job) is not None
        self._note("running")
        self._process = start(replace(self.order, threads=threads, is_resumed=is_resumed))
        code = wait(self._process)
        if code is not None and code > 128:  # it has saved
            # Slurm signals all processes of a job. If it preempts this one, it ends it here or sends SIGUSR1.
            time.sleep(_KILL_WAIT_SECONDS)
        end(self._process)
        self._note("ended", code)
        return code or 0

    def checkpoint(self) -> Any:
        """Called by submitit at SIGUSR1: lets the run save. Returns what is to be submitted again, or None."""
        import submitit

        process = self._process
        if process is None:  # the run has not been started
            return submitit.helpers.DelayedSubmission(Task(self.order, self.grace))
        process.send_signal(signal.SIGUSR1)
        code = wait(process, self.grace)
        kill_group(process.pid)  # not `end`: the interrupted code may hold the lock of Popen.wait
        if code is None or code > 128 or code < 0:
            self._note("requeued")
            return submitit.helpers.DelayedSubmission(Task(replace(self.order, is_resumed=True), self.grace))
        self._note("ended", code)
        return None

    def _note(self, state: str, code: int | None = None) -> None:
        content = {"job": self._job, "host": socket.gethostname(), "state": state, "code": code}
        write_json(self.order.folder / STATE_FILE, content)


def state_of(folder: Path, job: str) -> dict[str, Any] | None:
    """What a job says of itself; None if it has said nothing."""
    try:
        found = json_object(folder / STATE_FILE)
    except (OSError, ValueError):
        return None
    return found if found.get("job") == job else None


@dataclass
class _Submitted:
    """A job: its id, submitit's object for it, whether this process submitted it, and when Slurm had ended it."""

    name: str
    job: Any
    is_own: bool
    over: float | None = None


class SlurmExecutor:
    """Jobs of Slurm. See `Executor`.

    Args:
        settings: NAME -> VALUE of `--slurm_NAME VALUE`.
        device: `--device` of the runs.
        most: jobs that wait or run at once; None: 1000, or 8 for a search.
        is_search: the next run depends on the results so far.
        grace: seconds that a run has to save.

    Raises:
        MachineError: submitit is not installed.
        UsageError: a setting has a wrong value.
    """

    outlives_driver = True

    def __init__(self, settings: dict[str, str], device: str, most: int | None, is_search: bool, grace: float):
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = _SIGNAL  # read when submitit is imported, here and in the jobs
        try:
            import submitit
        except ImportError as error:
            raise missing("submitit", "slurm", error) from error
        self._submitit, self._device, self._grace = submitit, device, grace
        self._most = most or (_MOST_OF_SEARCH if is_search else _MOST)
        settings = dict(settings)
        self._cluster = settings.pop("cluster", "slurm")
        if self._cluster not in _POLL_SECONDS:
            raise UsageError(f"--slurm_cluster {self._cluster}: choose slurm or {_LOCAL}")
        self._minutes = _minutes(settings.pop("time", str(_MINUTES)))
        self._requeues = _number("max_num_timeout", settings.pop("max_num_timeout", "100"), int)
        self._parameters = _parameters(settings)
        self._active: list[Job] = []
        self._next_poll = 0.0
        self.where = f"{'Slurm' if self._cluster != _LOCAL else 'this host'}, at most {self._most} runs at once"

    def open(self, folder: Path) -> None:
        """Finds Slurm's commands, and lets its jobs find this package."""
        os.environ["PYTHONPATH"] = python_path()
        self._folder = Path.cwd() / folder / _FOLDER
        make = self._submitit.LocalExecutor if self._cluster == _LOCAL else self._submitit.SlurmExecutor
        try:
            self._executor = make(self._folder, max_num_timeout=self._requeues)
            if self._cluster == _LOCAL:
                self._executor.update_parameters(timeout_min=self._minutes)
            else:
                self._executor.update_parameters(time=self._minutes, **self._parameters)
        except RuntimeError as error:
            raise MachineError(
                f"--executor slurm: {first_line(error)}", "start the sweep on a host of the cluster"
            ) from error

    def free(self) -> int:
        """The number of jobs below the limit."""
        return self._most - len(self._active)

    def submit(self, jobs: list[Job]) -> None:
        """Submits the jobs as one array. A run whose job of an earlier sweep still waits or runs is taken over."""
        earlier = self._earlier([job.run for job in jobs])
        new = []
        for job in jobs:
            self._active.append(job)
            job.handle = earlier.get(job.run.folder)
            if job.handle is None:
                try:
                    prepare(job.run)
                except OSError as error:
                    job.ends(CheckpointError.exit_code, f"the job cannot be submitted: {error}")
                    continue
                new.append(job)
        if not new:
            return
        tasks = [Task(order_of(job.run, self._device, 0, job.is_resumed), self._grace) for job in new]
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the error of sbatch, which the exception has too
                submitted = self._executor.submit_array(tasks)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise MachineError(f"--executor slurm: the jobs were refused: {first_line(error)}") from error
        for job, found in zip(new, submitted, strict=True):
            job.handle = _Submitted(found.job_id, found, True)
            write_json(job.run.folder / JOB_FILE, {"job": found.job_id, "cluster": self._cluster})

    def _earlier(self, runs: list[SweepRun]) -> dict[Path, _Submitted]:
        """folder -> the job that an earlier sweep submitted for a run, if it has not ended."""
        names: dict[Path, str] = {}
        for run in runs:
            with contextlib.suppress(OSError, ValueError):
                noted = json_object(run.folder / JOB_FILE)
                name, state = str(noted.get("job")), state_of(run.folder, str(noted.get("job")))
                is_job = re.fullmatch(r"\d+(_\d+)?", name) and noted.get("cluster") == self._cluster
                if is_job and (state is None or state["state"] != "ended"):
                    names[run.folder] = name
        alive = self._alive(set(names.values()))
        kind = self._submitit.LocalJob if self._cluster == _LOCAL else self._submitit.SlurmJob
        return {at: _Submitted(name, kind(self._folder, name), False) for at, name in names.items() if name in alive}

    def _alive(self, names: set[str]) -> set[str]:
        """Those of the jobs that wait or run.

        Raises:
            MachineError: Slurm does not answer.
        """
        if not names or self._cluster == _LOCAL:
            return {name for name in names if _is_controller(int(name), self._folder)}
        command = ["squeue", "--me", "--noheader", "--array", "--format=%F_%K %A"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MachineError(f"--executor slurm: squeue does not answer: {first_line(error)}") from error
        if done.returncode:
            raise MachineError(f"--executor slurm: squeue: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
        return names & set(done.stdout.split())

    def poll(self, jobs: list[Job]) -> None:
        """Reads the state files, and asks Slurm about jobs that have left none."""
        if time.monotonic() < self._next_poll:
            return
        self._next_poll = time.monotonic() + _POLL_SECONDS[self._cluster]
        for job in jobs:
            found = state_of(job.run.folder, job.handle.name) or {}
            state = found.get("state")
            if state == "ended":
                job.ends(found.get("code") or 0)
            elif self._is_over(job.handle):
                slurm = str(job.handle.job.state).split(" ")[0]
                job.ends(1, f"job {job.handle.name}: {slurm}", is_lost=slurm in _ENDED_BY_HOST)
            elif state == "running" and job.began is None:
                job.starts(f"{found.get('host')} (job {job.handle.name})")
            elif state == "requeued" and job.began is not None:
                job.began, job.place, job.is_resumed = None, "", True
                job.tell(EventKind.PREEMPTED, f"preempted {job.run.name}: it has saved, and its job waits again")

    def _is_over(self, handle: _Submitted) -> bool:
        """Whether a job has ended, and its host has had the time to show its state file."""
        if handle.over is None:
            is_orphan = self._cluster == _LOCAL and not handle.is_own
            ended = not _is_controller(int(handle.name), self._folder) if is_orphan else handle.job.done()
            handle.over = time.monotonic() if ended else None
        return handle.over is not None and time.monotonic() - handle.over > _LAG_SECONDS[self._cluster]

    def cancel(self, jobs: list[Job], number: int) -> None:
        """Cancels the jobs in Slurm, which sends SIGTERM, so that their runs save."""
        for job in jobs:
            with contextlib.suppress(OSError):
                job.handle.job.cancel(check=False)

    def collect(self, job: Job) -> None:
        """Forgets the job, so that a later sweep does not look for it."""
        self._active.remove(job)
        with contextlib.suppress(OSError):
            (job.run.folder / JOB_FILE).unlink(missing_ok=True)

    def leave_out(self, job: Job) -> bool:
        """False: Slurm drains hosts that cannot run jobs."""
        return False

    def close(self) -> None:
        """Does nothing: the jobs go on."""


def _is_controller(pid: int, folder: Path) -> bool:
    """Whether a process is submitit's, for a job in `folder`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(str(folder)) in words


def _number(name: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"--slurm_{name} {text}: not a number") from None


def _minutes(text: str) -> int:
    """Minutes of a time limit: "90", or hours as Slurm writes them, "1:30:00"."""
    parts = text.split(":")
    if not all(part.isdecimal() for part in parts) or len(parts) not in (1, 3) or not any(map(int, parts)):
        raise UsageError(f"--slurm_time {text}: give minutes, or hours as H:MM:SS")
    return int(text) if len(parts) == 1 else int(parts[0]) * 60 + int(parts[1]) + (int(parts[2]) > 0)


def _parameters(settings: dict[str, str]) -> dict[str, Any]:
    """The settings as submitit takes them.

    Raises:
        UsageError: a setting has a wrong value, or the sweep itself sets it.
    """
    if taken := [name for name in settings if name in _OURS]:
        raise UsageError(f"--slurm_{taken[0]} cannot be given: a run is one task on one host, and the sweep sets it")
    own = {name: _number(name, text, _OF_SUBMITIT[name]) for name, text in settings.items() if name in _OF_SUBMITIT}
    more = {name: text or True for name, text in settings.items() if name not in _OF_SUBMITIT}
    defaults = {"job_name": "bert_glue", "requeue": True}
    return {"signal_delay_s": _SAVING_SECONDS, "stderr_to_stdout": True, **own,
            "additional_parameters": {**defaults, **more}}  # fmt: skip
