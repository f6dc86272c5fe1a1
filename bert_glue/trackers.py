"""Experiment trackers behind `--report_to`, through accelerate: tensorboard where installed, others on request.

Each tracker lives in a thread of its own that reads a queue: one that hangs or fails costs the run nothing but
a line of the log, and at the end at most `CLOSE_SECONDS`.
"""

from __future__ import annotations

import netrc
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

from bert_glue.arguments import FLAGS, Arguments
from bert_glue.errors import MachineError, first_line
from bert_glue.whole_file import make_own_folder

CLOSE_SECONDS = 20.0  # for all trackers together to send what they hold


class _Worker(threading.Thread):
    """One tracker: started, fed and closed by this thread alone, as some of them ask for.

    A daemon: a tracker that hangs does not keep the process. `problem` is a line once it has failed.
    """

    def __init__(self, kind: type, name: str, args: Arguments):
        super().__init__(daemon=True, name=f"tracker {name}")
        self.kind, self.tracker_name, self.args = kind, name, args
        self.entries: queue.SimpleQueue[tuple[dict, int] | None] = queue.SimpleQueue()
        self.problem: str | None = None

    def run(self) -> None:
        """Until `None` is read."""
        doing = "it does not start"
        try:
            tracker = _start(self.kind, self.args)
            doing = "it has failed and gets no more"
            while (entry := self.entries.get()) is not None:
                values, step = entry
                tracker.log(values, step=step)
            tracker.finish()
        except BaseException as error:  # each tracker fails in its own way, some by SystemExit
            self.problem = f"--report_to {self.tracker_name}: {doing}: {first_line(error)}"


class Trackers:
    """Every tracker named by `--report_to`; none of them on ranks that do not write.

    Args:
        is_first: whether this rank reports.

    `notes` are lines for the log.

    Raises:
        MachineError: a named tracker's package is not installed.
    """

    def __init__(self, args: Arguments, is_first: bool):
        self._workers: list[_Worker] = []
        self.notes: list[str] = []
        if args.report_to == "none" or not is_first:
            return
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
        for name in _names(args.report_to, available):
            if name not in available:
                here = ", ".join(available) or "none"
                raise MachineError(f"--report_to {name}: its package is not installed (available: {here})")
            self.notes += _stay_offline_without_login(name)
            self._workers.append(_Worker(LOGGER_TYPE_TO_CLASS[name], name, args))
        if self._workers and not PartialState._shared_state:
            PartialState(cpu=True)  # accelerate's trackers log through it; several ranks have made one already
        for worker in self._workers:
            worker.start()

    def log(self, values: dict, step: int) -> None:
        """Numbers of one log entry; texts and nulls are left out, and `step`, their axis. Waits for nothing."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        for worker in self._workers:
            worker.entries.put((numbers, step))

    def problems(self) -> list[str]:
        """A line for each tracker that failed since the last call."""
        failed = [worker for worker in self._workers if worker.problem]
        self._workers = [worker for worker in self._workers if worker not in failed]
        return [worker.problem or "" for worker in failed]

    def close(self) -> list[str]:
        """Let every tracker write what it still holds, for a limited time; lines on those that did not."""
        until = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.entries.put(None)
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
        lines = self.problems()
        open_still = [worker for worker in self._workers if worker.is_alive()]
        self._workers = []
        return lines + [
            f"--report_to {worker.tracker_name}: not done after {CLOSE_SECONDS:g} s, left alone; "
            "what it did not send is in --output_dir too"
            for worker in open_still
        ]


def _names(report_to: str | None, available: list[str]) -> list[str]:
    if report_to is None:
        return ["tensorboard"] if "tensorboard" in available else []
    known = FLAGS["report_to"].choices
    return [name for name in available if name in known] if report_to == "all" else report_to.split(",")


# tracker -> (its key, its mode, the file a login leaves, the host in it)
_LOGINS = {
    "wandb": ("WANDB_API_KEY", "WANDB_MODE", "~/.netrc", "api.wandb.ai"),
    "swanlab": ("SWANLAB_API_KEY", "SWANLAB_MODE", "~/.swanlab/.netrc", ""),
}


def _stay_offline_without_login(name: str) -> list[str]:
    """A batch job has nobody to answer a login prompt: without a login a tracker records to files.

    Returns:
        A line that says so; none where there is a login, or the user chose a mode.
    """
    if name not in _LOGINS:
        return []
    key, mode, file, host = _LOGINS[name]
    if os.environ.get(key) or os.environ.get(mode) or _has_login(Path(os.environ.get("NETRC", file)), host):
        return []
    os.environ[mode] = "offline"
    return [f"--report_to {name}: no login here ({key} is not set): it records to files ({mode}=offline)"]


def _has_login(file: Path, host: str) -> bool:
    try:
        return any(host in known for known in netrc.netrc(file.expanduser()).hosts)
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: no home folder
        return False


def _start(kind: type, args: Arguments) -> Any:
    run_name = args.run_name or Path(args.output_dir).name
    folder = {}
    if kind.requires_logging_directory:
        folder["logging_dir"] = Path(args.output_dir) / "runs"
        make_own_folder(folder["logging_dir"])
        make_own_folder(folder["logging_dir"] / run_name)
    tracker = kind(run_name, **folder)
    if hasattr(tracker, "start"):
        tracker.start()
    settings = {n: v for n, v in vars(args).items() if isinstance(v, str | int | float) and not FLAGS[n].secret}
    tracker.store_init_configuration(settings)
    return tracker
