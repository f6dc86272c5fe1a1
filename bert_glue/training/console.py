"""The console of a training run: a progress bar or plain lines, experiment trackers, and signals that request a stop.

Each tracker runs in a thread of its own and reads a queue. A tracker that hangs or fails costs the run one line of the
log, and at most `CLOSE_SECONDS` at the end.
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
from bert_glue.errors import MachineError, first_line, print_lines, printable
from bert_glue.result_keys import is_measured
from bert_glue.storage.files import make_own_folder

# A terminal and a launcher both forward the same Ctrl-C, and some schedulers do the same with SIGTERM.
_SAME_SIGNAL_SECONDS = 2.0


class StopSignals:
    """Turns signals into a request to stop, which the loop reads once a step.

    The signals are SIGTERM, SIGINT and SIGQUIT, SIGHUP from a terminal that closes (unless nohup ignores it), and
    SIGUSR1, with which Slurm announces the end of a job (`--signal`).

    Args:
        is_watching: False leaves the signals of the process alone.

    Attributes:
        number: number of the first signal; None before any signal.
        ends_at_once: True until training begins, because there is nothing to save before that.
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
        """Request a stop after the step or evaluation, with a checkpoint; a second signal ends the process at once."""
        is_repeated = self.number is not None and time.monotonic() - self._received > _SAME_SIGNAL_SECONDS
        if self.ends_at_once or is_repeated:
            raise SystemExit(128 + number)
        if self.number is None:
            self.number = number
            self._received = time.monotonic()

    def is_requested(self) -> bool:
        """True once a signal has asked this rank to stop."""
        return self.number is not None

    def ignore(self) -> None:
        """Ignore signals from now on, so that a launcher that cleans up cannot change the exit code."""
        if self._is_watching:
            for number in self._numbers:
                # Not by SIG_IGN, which a process that starts from here would inherit.
                signal.signal(number, lambda *_: None)


def format_entry(entry: dict) -> str:
    """A log entry as `name=value` words with shortened numbers."""
    words = []
    for name, value in entry.items():
        if isinstance(value, float):
            value = f"{value:.3e}" if name == "learning_rate" else f"{value:.5g}"
        words.append(f"{name}={value}")
    return " ".join(words)


class ConsoleLog:
    """The log lines and the progress bar of one run.

    Args:
        is_shown: True on the first rank; the others print nothing.
        wants_bar: False with `--disable_tqdm`.
    """

    def __init__(self, is_shown: bool, wants_bar: bool):
        self.is_shown = is_shown
        # What the bar shows beside the steps: loss and rate of the last entry, and the score of the last evaluation.
        self._last = self._score = ""
        self._samples_per_step, self._score_key = 0, ""
        self._wants_bar = wants_bar and is_shown and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def set_scale(self, samples_per_step: int, score_key: str) -> None:
        """Say what the bar counts in.

        Args:
            samples_per_step: on all ranks together.
            score_key: the key of the score in the entry of an evaluation, such as eval_f1.
        """
        self._samples_per_step, self._score_key = samples_per_step, score_key

    def line(self, text: str) -> None:
        """Print one line of the log."""
        if not self.is_shown:
            return
        if self._bar is None:
            print_lines(text)
        else:  # above the bar
            self._bar.console.print(printable(text), markup=False, highlight=False)

    def entry(self, entry: dict) -> None:
        """Print a line of the log with the numbers of an entry."""
        if "loss" in entry:
            self._last = f"loss {entry['loss']:.4f} rate {entry['learning_rate']:.2e}"
        if entry.get(self._score_key) is not None:
            self._score = f"{self._score_key} {entry[self._score_key]:.4f}"
        self.line(format_entry(entry))

    def advance(self, step: int, total: int, epoch: float) -> None:
        """Move the bar."""
        if not self._wants_bar:
            return
        if self._bar is None:
            self._bar = _make_bar()
            self._task = self._bar.add_task("", total=total, epoch=epoch, last="")
            self._bar.start()
        steps_per_second = self._bar.tasks[0].speed  # of the last 30 s
        speed = f"{steps_per_second * self._samples_per_step:.1f} samples/s" if steps_per_second else ""
        last = " ".join(filter(None, (self._last, self._score, speed)))
        self._bar.update(self._task, completed=step, epoch=epoch, last=last)

    def close(self) -> None:
        """Remove the bar."""
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
    """One tracker, which this thread alone starts, calls and closes, as some trackers require.

    The thread is a daemon, so that a tracker that hangs does not keep the process alive. `problem` is a line for the
    log once the tracker has failed.
    """

    def __init__(self, kind: type, name: str, args: Arguments):
        super().__init__(daemon=True, name=f"tracker {name}")
        self.kind = kind
        self.tracker_name = name
        self.args = args
        self.entries: queue.SimpleQueue[tuple[dict, int] | None] = queue.SimpleQueue()
        self.problem: str | None = None

    def run(self) -> None:
        """Call the tracker with every item of the queue, until an item is None."""
        doing = "it does not start"
        try:
            tracker = _start(self.kind, self.args)
            doing = "it has failed and receives no more entries"
            while (entry := self.entries.get()) is not None:
                values, step = entry
                tracker.log(values, step=step)
            tracker.finish()
        except BaseException as error:  # each tracker fails in its own way, some by SystemExit
            self.problem = f"--report_to {self.tracker_name}: {doing}: {first_line(error)}"


class Trackers:
    """The trackers that `--report_to` names; none on ranks that do not write.

    Args:
        is_first: whether this rank reports.

    Attributes:
        notes: lines for the log.

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
        """Queue the numbers of one log entry, without texts, nulls and `step`, their axis. Waits for nothing."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        for worker in self._workers:
            worker.entries.put((numbers, step))

    def log_results(self, results: dict, step: int) -> None:
        """Queue the figures of `all_results.json`, without the entries that describe the run."""
        self.log({name: value for name, value in results.items() if is_measured(name)}, step)

    def problems(self) -> list[str]:
        """One line for each tracker that has failed since the last call."""
        failed = [worker for worker in self._workers if worker.problem]
        self._workers = [worker for worker in self._workers if worker not in failed]
        return [worker.problem or "" for worker in failed]

    def close(self) -> list[str]:
        """Give every tracker a limited time to send what it still holds; return a line for each that does not."""
        until = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.entries.put(None)
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
        lines = self.problems()
        open_still = [worker for worker in self._workers if worker.is_alive()]
        self._workers = []
        return lines + [
            f"--report_to {worker.tracker_name}: not finished after {CLOSE_SECONDS:g} s; the run waits no longer, "
            "and --output_dir holds what it did not send"
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
    """Let trackers without a login record to files, because nobody answers a login prompt in a batch job.

    Returns:
        One line for each of them. None if there is a login or the user has chosen a mode.
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
