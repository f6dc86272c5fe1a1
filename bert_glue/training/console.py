"""What a person sees of a training run: a bar or plain lines, experiment trackers, signals that ask for a stop.

Each tracker lives in a thread of its own that reads a queue: one that hangs or fails costs the run nothing but
a line of the log, and at the end at most `CLOSE_SECONDS`.
"""

from __future__ import annotations

import netrc
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import FLAGS, Arguments
from bert_glue.errors import MachineError, first_line
from bert_glue.result_keys import is_measured
from bert_glue.storage.files import make_own_folder

# A terminal and a launcher both pass one Ctrl-C on, and so do some schedulers with SIGTERM.
_SAME_SIGNAL_SECONDS = 2.0


class StopSignals:
    """Signals as a request to stop, which the loop reads once a step.

    SIGTERM and SIGINT; SIGHUP of a terminal that is gone, unless nohup ignores it; SIGQUIT; and SIGUSR1, by which
    Slurm warns of the end of a job (`--signal`).

    Args:
        is_watching: False leaves the signals of the process alone.

    Attributes:
        number: of the signal that came first, None before any.
        ends_at_once: True until training begins: before that there is nothing to save.
    """

    def __init__(self, is_watching: bool = True):
        self.number: int | None = None
        self.ends_at_once = True
        self._is_watching = is_watching
        self._received = 0.0
        self._numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._numbers.append(signal.SIGHUP)
        if is_watching:
            for number in self._numbers:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        """First signal: finish the step, or leave the evaluation, and save. A later one: end at once."""
        is_repeated = self.number is not None and time.monotonic() - self._received > _SAME_SIGNAL_SECONDS
        if self.ends_at_once or is_repeated:
            raise SystemExit(128 + number)
        if self.number is None:
            self.number = number
            self._received = time.monotonic()

    def is_requested(self) -> bool:
        """True once a signal asked this rank to stop."""
        return self.number is not None

    def ignore(self) -> None:
        """Nothing is left to stop: a launcher that clears up must not change the exit code."""
        if self._is_watching:
            for number in self._numbers:
                # Not SIG_IGN, which a process started from here would inherit.
                signal.signal(number, lambda *_: None)


def format_entry(entry: dict) -> str:
    """A log entry as `name=value` words, numbers shortened."""
    words = []
    for name, value in entry.items():
        if isinstance(value, float):
            value = f"{value:.3e}" if name == "learning_rate" else f"{value:.5g}"
        words.append(f"{name}={value}")
    return " ".join(words)


class ConsoleLog:
    """Lines and the progress bar of one run.

    Args:
        is_shown: False on all ranks but the first, which then print nothing.
        wants_bar: False with `--disable_tqdm`.
    """

    def __init__(self, is_shown: bool, wants_bar: bool):
        self.is_shown = is_shown
        self._last = ""  # loss and rate of the last entry, for the bar
        self._wants_bar = wants_bar and is_shown and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def line(self, text: str) -> None:
        """One line of the log."""
        if not self.is_shown:
            return
        if self._bar is None:
            print(text, flush=True)
        else:  # above the bar
            self._bar.console.print(text, markup=False, highlight=False)

    def entry(self, entry: dict) -> None:
        """A line of the log with an entry's numbers."""
        if "loss" in entry:
            self._last = f"loss {entry['loss']:.4f} rate {entry['learning_rate']:.2e}"
        self.line(format_entry(entry))

    def advance(self, step: int, total: int, epoch: float) -> None:
        """Move the bar."""
        if not self._wants_bar:
            return
        if self._bar is None:
            self._bar = _make_bar()
            self._task = self._bar.add_task("", total=total, epoch=epoch, last="")
            self._bar.start()
        self._bar.update(self._task, completed=step, epoch=epoch, last=self._last)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f} epoch {task.fields[epoch]:.2f}"),
        TextColumn("{task.fields[last]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


CLOSE_SECONDS = 20.0  # for all trackers together to send what they hold


class _Worker(threading.Thread):
    """One tracker: started, fed and closed by this thread alone, as some of them ask for.

    A daemon: a tracker that hangs does not keep the process. `problem` is a line once it has failed.
    """

    def __init__(self, kind: type, name: str, args: Arguments):
        super().__init__(daemon=True, name=f"tracker {name}")
        self.kind = kind
        self.tracker_name = name
        self.args = args
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

    def log_results(self, results: dict, step: int) -> None:
        """`all_results.json` without what says how the run was made."""
        self.log({name: value for name, value in results.items() if is_measured(name)}, step)

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
