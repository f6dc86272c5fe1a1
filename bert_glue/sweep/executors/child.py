"""The process of one run: run_glue.py as a child of this process, with its log and its error in the run's folder."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bert_glue.errors import ERROR_FILE, MachineError, first_line
from bert_glue.launch.ranks import kill_group, signalled_with_parent
from bert_glue.storage.files import open_own
from bert_glue.sweep.plan import SweepRun

RUN_GLUE = Path(__file__).resolve().parents[3] / "run_glue.py"
LOG_FILE = "run.log"
ERROR_NAME = "error.json"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Order:
    """What a host must know to start a run. It travels to other hosts, so it holds plain values only.

    Args:
        folder: `--output_dir`.
        flags: the command line of run_glue.py, without the device and without resuming.
        device: the value of `--device`.
        threads: OMP_NUM_THREADS of the run. 0 keeps the host's value.
        is_resumed: look for a checkpoint first.
        work_folder: relative paths among the flags begin there. None: the current folder.
    """

    folder: Path
    flags: tuple[str, ...]
    device: str
    threads: int
    is_resumed: bool
    work_folder: Path | None = None

    @property
    def command(self) -> list[str]:
        """The command of the process, with this host's Python."""
        resume = ["--resume_from_checkpoint=auto"] if self.is_resumed else []
        return [sys.executable, str(RUN_GLUE), *self.flags, f"--device={self.device}", "--disable_tqdm", *resume]


def order_of(run: SweepRun, device: str, threads: int, is_resumed: bool) -> Order:
    """The order for a run on any host that sees the file system of this one."""
    here = Path.cwd()
    return Order(here / run.folder, run.flags, device, threads, is_resumed, here)


def missing(package: str, executor: str, error: ImportError) -> MachineError:
    """The error of an executor whose package cannot be imported. `executor` is also the name of the extra."""
    return MachineError(
        f"--executor {executor} needs the package {package} ({first_line(error)})",
        f"python -m pip install {package}, or bert-glue with its extra [{executor}]",
    )


def prepare(run: SweepRun) -> None:
    """Makes the folder of a run, notes its settings, and removes the error of an earlier attempt.

    Raises:
        OSError: the folder cannot be written.
    """
    run.note_settings()
    (run.folder / ERROR_NAME).unlink(missing_ok=True)


def start(order: Order, settings: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Starts the process of a run in a session of its own. It gets SIGTERM, and saves, when this process ends.

    Args:
        settings: further environment variables.

    Raises:
        OSError: the log cannot be written, or the process cannot be started.
    """
    ends_with_parent = signalled_with_parent(signal.SIGTERM)

    def before_exec() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's workers block SIGINT, and a child inherits that
        ends_with_parent()

    threads = str(order.threads)
    own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if order.threads else {}
    own["WORLD_SIZE"] = "1"  # each run is alone, even if srun started this process on several hosts
    own[ERROR_FILE] = str(order.folder / ERROR_NAME)
    with open_own(order.folder / LOG_FILE) as log:
        log.write(os.fsencode(f"\n$ {shlex.join(order.command)}\n"))
        log.flush()
        return subprocess.Popen(
            order.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(settings or {}), **own},
            cwd=order.work_folder, start_new_session=True, preexec_fn=before_exec,
        )  # fmt: skip


def exit_status(pid: int) -> int | None:
    """The exit code of a child, -N if signal N ended it, None while it runs. The child is not reaped.

    Unlike `Popen.poll`, this takes no lock, so a signal handler may call it while the interrupted code waits, too.
    """
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def wait(process: subprocess.Popen, seconds: float | None = None) -> int | None:
    """The exit code of a child as `exit_status` gives it, None if it runs for more than `seconds`."""
    until = None if seconds is None else time.monotonic() + seconds
    while (code := exit_status(process.pid)) is None and (until is None or time.monotonic() < until):
        time.sleep(_POLL_SECONDS)
    return code


def end(process: subprocess.Popen) -> None:
    """Kills what is left of the session of a process, and reaps the process."""
    kill_group(process.pid)
    process.wait()
