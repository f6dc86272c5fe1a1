"""GLUE tasks x seeds x learning rates as a queue: one run a device, resumable, with a table and a summary.

    python -m bert_glue.sweep --sample --tasks mrpc,rte --seeds 1-3
    python -m bert_glue.sweep --model ./bert-large-cased --devices npu:0,npu:1 -- --bf16
    python -m bert_glue.sweep --tasks own --train_file reviews.csv --validation_file later.csv \\
        --text_column_names text --label_column_name label --model bert-base-cased --learning_rates 2e-5,3e-5

Eight devices on one small task are not the way: the published eight-device figures lie 3 to 10 points
below the one-device ones, because a global batch of 256 leaves a few hundred updates. Eight one-device
runs take the same time for eight results, each at the full figure; and one seed is noise anyway.

Stop it in any way (signals save checkpoints) and give the same command again: finished runs are kept,
unfinished ones continue. Exit codes: 0 every run is done; 2 usage, nothing was started; 129, 130, 143
ended by a signal; 8 a mean misses a bound of --expect; else some runs failed: the exit code of all of them if
they share one, or 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import FLAGS
from bert_glue.config.command_line import CommandParser
from bert_glue.config.expectations import Expectation, missed, read_expectations
from bert_glue.config.metric_checks import metric_names
from bert_glue.config.values import flag_value, read_seconds
from bert_glue.errors import (
    CheckpointError,
    ExpectationError,
    MachineError,
    UsageError,
    UserError,
    exit_code_of,
    first_line,
    printable,
    run_program,
    say,
)
from bert_glue.storage.lock import FolderLock, wait_until_free
from bert_glue.sweep.own_data import DATA_FLAGS, add_flags, check_flags, data_flags, read_own_data
from bert_glue.sweep.plan import Suite, SweepRun, plan, seeds_of, tasks_of
from bert_glue.sweep.scheduler import Attempt, Event, EventKind, Queue, Slot, last_line
from bert_glue.sweep.summary import best_mean, lines, summarise, write
from bert_glue.tasks import OWN, GlueTask


class Listed:
    """A source of runs that are known from the start."""

    def __init__(self, runs: list[SweepRun]):
        self._waiting = deque(runs)

    def next_run(self) -> SweepRun | None:
        """The next in order."""
        return self._waiting.popleft() if self._waiting else None

    def ended(self, run: SweepRun, is_done: bool) -> None:
        """Nothing follows from a result."""


def main(argv: list[str]) -> int:
    """Run a sweep; returns its exit code."""
    end = argv.index("--") if "--" in argv else len(argv)
    args = _parser().parse_args(argv[:end])
    epochs = (f"--num_train_epochs={args.train_epochs}",) if args.train_epochs else ()
    extra = (*epochs, *argv[end + 1 :])
    return exit_code_of(lambda: _sweep(args, extra))


def _parser() -> CommandParser:
    parser = CommandParser(
        same={"model_name_or_path": "model", "learning_rate": "learning_rates", "seed": "seeds",
              "task_name": "tasks", "device": "devices"},
        passes_on=True, prog="bert_glue.sweep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Flags of run_glue.py go behind -- and are the same for all runs.",
    )  # fmt: skip
    add = parser.add_argument
    # --TASK, --device and --train_epochs are the other launchers' words.
    add("--tasks", "--TASK", metavar="LIST", help="comma-separated, all (default), or own: the data of --train_file")
    add("--seeds", default="1-3", metavar="LIST", help="such as 1,2,7 or 1-5; default 1-3")
    add("--learning_rates", default="", metavar="LIST", help="one run each; default: the recipe's only")
    add("--sample", action="store_true", help="generated sample data (not GLUE); without --model a tiny BERT")
    add("--data_path", metavar="FOLDER", help="the original GLUE folder; default: the hub's data")
    add("--model", "--model_name_or_path", metavar="NAME", help="folder or hub name; default: bert-large-cased")
    add("--recipe", metavar="NAME", help="reference (default), stable, ... or a config file; own data: none")
    add("--output_dir", default="output/sweep", metavar="FOLDER", help="default: output/sweep")
    add("--train_epochs", metavar="N", help="--num_train_epochs of all runs; default: the recipe's")
    add(
        "--devices",
        "--device",
        default="auto",
        metavar="LIST",
        help="such as npu:0,npu:1; auto (default): all of the best kind",
    )
    add("--jobs", type=int, default=1, metavar="N", help="runs at once per device; host threads are divided; default 1")
    add("--grace", type=read_seconds, default=300.0, metavar="SECONDS", help="for saving after a signal; default 300")
    add("--keep_checkpoints", action="store_true", help="of finished runs too; default: only the model is kept")
    add("--expect", nargs="+", default=[], metavar="BOUND", help="such as 'mrpc.f1>=0.88', of the mean over seeds")
    add("--dry_run", action="store_true", help="show the runs and how far they are, start nothing")
    add("--search", type=int, metavar="N", help="instead of fixed settings, N trials of Optuna a task")
    add("--storage", metavar="URL", help="of the study, shared by several machines; default: sqlite in --output_dir")
    add("--storage_timeout", type=read_seconds, metavar="SECONDS", help="for one answer of --storage; default 60")
    add("--space", nargs="+", default=[], metavar="FLAG=LOW:HIGH", help="ranges of the search, or FLAG=A,B,C")
    add_flags(parser)
    return parser


def _sweep(args: argparse.Namespace, extra: tuple[str, ...]) -> int:
    args.tasks = args.tasks or (OWN if any(getattr(args, name) for name in DATA_FLAGS) else "all")
    check_flags(args, extra)
    suite = _suite(args, extra)
    tasks, seeds = tasks_of(args.tasks), seeds_of(args.seeds)
    rates = [rate.strip() for rate in args.learning_rates.split(",")] if args.learning_rates else []
    if args.tasks == OWN:
        chosen = {"learning_rate": rates[0]} if rates else {}
        own = read_own_data(suite.run(tasks[0], seeds[0], chosen).flags)
        say(*own.lines)
        suite, tasks = replace(suite, data_sha256=own.sha256), [own.task]
    if args.jobs < 1 or (args.search is not None and args.search < 1):
        raise UsageError("--jobs and --search: at least 1")
    if args.search is not None:
        from bert_glue.sweep.search import STORAGE_SECONDS, Search, read_space

        if rates:
            raise UsageError("--learning_rates and --search: the search chooses learning rates; give one")
        space = read_space(args.space, args.sample)
        source = Search(suite, tasks, seeds, args.search, args.storage, space, args.storage_timeout or STORAGE_SECONDS)
        runs = source.runs  # grows while the search goes on
    else:
        if args.storage or args.space or args.storage_timeout:
            raise UsageError("--storage, --storage_timeout and --space belong to --search")
        runs = plan(suite, tasks, seeds, rates)
    bounds = _bounds(args.expect, tasks)
    if args.dry_run:
        if args.search is not None:
            print(f"{args.search} trials a task within {source.space}")
        say(*map(_state, runs))
        return 0
    slots = _slots(args.devices, args.jobs)
    with FolderLock(suite.output_dir):
        if args.search is not None:
            source.open()
        # A sweep that was killed leaves runs that are still saving their checkpoints.
        wait_until_free([run.folder for run in runs], args.grace)
        waiting = [run for run in runs if run.results() is None]
        found = len(runs) - len(waiting)
        rest = f"{len(waiting)} to do" if args.search is None else f"{args.search} trials a task within {source.space}"
        print(f"{found} runs are done already; {rest}; on {', '.join(slot.device for slot in slots)}")
        table = SweepTable(None if args.search is not None else len(runs), found)
        queue = Queue(source if args.search is not None else Listed(waiting), slots, args.grace, table.tell, table.show)
        try:
            queue.run()
        finally:
            table.close()
            summary = summarise(runs, queue.failures)
            if args.search is not None:
                summary["search"] = source.summary()
            try:
                write(suite.output_dir, summary)
            except OSError as error:
                raise CheckpointError(f"{suite.output_dir}/summary.json cannot be written: {error.strerror}") from error
            if any(run.results() is not None for run in runs):
                _write_report(suite.output_dir)
        if not args.keep_checkpoints:
            _drop_checkpoints(runs)
    return _close(queue, summary, suite.output_dir) or _gate(bounds, runs)


def _write_report(output_dir: Path) -> None:
    """report.html over all finished runs; without it the sweep is still whole, so a failure costs one line."""
    from bert_glue.report.page import write_page
    from bert_glue.report.suite_page import find_runs, suite_page

    try:
        write_page(output_dir / "report.html", suite_page(find_runs([output_dir])))
    except UserError as error:
        say(f"note: no report.html: {first_line(error)}", file=sys.stderr)


def _close(queue: Queue, summary: dict, output_dir: Path) -> int:
    """Last lines, and the exit code."""
    for name, study in summary.get("search", {}).items():
        if "best" in study:
            best = ", ".join(f"{flag} {value}" for flag, value in study["best"].items())
            print(f"best of {study['COMPLETE']} trials, {name}: {100 * study['best_value']:.2f} with {best}")
    say(*lines(summary), f"all figures: {output_dir}/summary.json, summary.csv; report.html")
    for folder, reason in queue.failures.items():
        say(f"failed: {folder}: {reason}", file=sys.stderr)
    if queue.stop_signal is not None:
        print("stopped: the same command continues", file=sys.stderr)
        return 128 + queue.stop_signal
    codes = set(queue.codes.values())
    return 0 if not codes else codes.pop() if len(codes) == 1 else 1


def _bounds(texts: list[str], tasks: list[GlueTask]) -> list[tuple[GlueTask, Expectation]]:
    """The bounds of --expect, each with its task.

    Raises:
        UsageError: not a bound, or not of one of the tasks.
    """
    found = []
    for text in ",".join(texts).split(",") if texts else []:
        name = text.strip().partition(".")[0]
        task = next((task for task in tasks if task.name == name), tasks[0])
        if len(tasks) > 1 and task.name != name:
            raise UsageError(f"--expect {text}: begin with one of the tasks, such as {task.name}.{task.headline}>=0.8")
        try:
            found += [(task, bound) for bound in read_expectations(text, task.name, metric_names(task))]
        except ValueError as error:
            raise UsageError(f"--expect: {error}") from None
    return found


def _gate(bounds: list[tuple[GlueTask, Expectation]], runs: list[SweepRun]) -> int:
    """0, or 8 after a line on each bound that a mean misses."""
    judged = [
        bound.judge({bound.key: best_mean([run for run in runs if run.task == task], bound.key, bound.is_upper)})
        for task, bound in bounds
    ]
    for line in missed(judged):
        print(f"error: mean over seeds: {line}", file=sys.stderr)
    return ExpectationError.exit_code if missed(judged) else 0


def _suite(args: argparse.Namespace, extra: tuple[str, ...]) -> Suite:
    if args.sample and args.data_path:
        raise UsageError("--sample and --data_path are two sources of data: give one")
    source = ["--sample"] if args.sample else []
    if args.data_path:
        source.append(f"--data_path={args.data_path}")
    source += data_flags(args)
    recipe = args.recipe or (None if args.tasks == OWN else "reference")
    local = Path(__file__).resolve().parents[2] / "bert-large-cased"
    default = None if args.sample else str(local) if local.is_dir() else "google-bert/bert-large-cased"
    return Suite(Path(args.output_dir), args.model or default, tuple(source), extra, recipe)


def _state(run: SweepRun) -> str:
    state = "done" if run.results() is not None else "to continue" if run.is_started() else "to start"
    return f"{state}: {run.name}: run_glue.py {shlex.join(run.flags)}"


def _slots(devices: str, jobs: int) -> list[Slot]:
    """One slot a device and job, with its share of the host's threads.

    Raises:
        UsageError: no such device name, or one given twice.
        MachineError: the devices of "auto" cannot be listed.
    """
    names = _devices_here() if devices == "auto" else [name.strip() for name in devices.split(",")]
    for name in names:
        try:
            flag_value(FLAGS["device"], name)
        except ValueError as error:
            raise UsageError(f"--devices: {error}") from None
    if len(set(names)) < len(names):
        raise UsageError("--devices: one is given twice; --jobs N lets N runs share each device")
    names = names * jobs
    threads = 0 if "OMP_NUM_THREADS" in os.environ else max(1, len(os.sched_getaffinity(0)) // len(names))
    return [Slot(name, threads) for name in names]


_LIST_SECONDS = 120  # a driver that hangs must not hold the sweep


def _devices_here() -> list[str]:
    # In a process of its own: a driver's state must not be forked into the runs.
    command = [sys.executable, "-m", "bert_glue.doctor.device_probe", "--list"]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIST_SECONDS)
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"--devices auto: no answer within {_LIST_SECONDS} s; name the devices, or run python -m bert_glue.doctor"
        ) from None
    try:
        fact = json.loads(done.stdout)
        return fact["devices"]
    except (ValueError, KeyError) as error:
        reason = re.sub(r"\s+", " ", (done.stderr or done.stdout).strip())[-300:]
        raise MachineError(f"--devices auto: {reason}; python -m bert_glue.doctor says more") from error


def _drop_checkpoints(runs: list[SweepRun]) -> None:
    """Delete the checkpoints of finished runs: they serve only to continue."""
    folders = [folder for run in runs if run.results() is not None for folder in run.folder.glob("checkpoint-*")]
    if folders:
        from bert_glue.storage.checkpoint import remove, step_of

        for folder in folders:
            if step_of(folder) >= 0:
                remove(folder)


_REFRESH_SECONDS = 1.0


class SweepTable:
    """Events and the state of every slot.

    Args:
        total: runs of the sweep; None in a search, which has no fixed number.
        done: of them finished earlier.
        is_live: None asks whether stderr is a terminal.
    """

    def __init__(self, total: int | None, done: int = 0, is_live: bool | None = None):
        self.total, self.done, self.failed = total, done, 0
        self._live: Any = None
        self._shown = 0.0
        if sys.stderr.isatty() if is_live is None else is_live:
            from rich.console import Console
            from rich.live import Live

            # No thread of its own: the queue forks.
            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()

    def tell(self, event: Event) -> None:
        """Count and print one event."""
        self.done += event.kind is EventKind.DONE
        self.failed += event.kind is EventKind.FAILED
        of_all = "" if self.total is None else f"[{self.done}/{self.total}] "
        if self._live is None:
            say(f"{of_all}{event.text}")
        else:
            self._live.console.print(printable(f"{of_all}{event.text}"), markup=False, highlight=False)

    def show(self, running: list[Attempt]) -> None:
        """Draw the table anew, once a second at most."""
        if self._live is None or time.monotonic() - self._shown < _REFRESH_SECONDS:
            return
        from rich.table import Table

        self._shown = time.monotonic()
        of_all = "" if self.total is None else f" of {self.total}"
        table = Table("device", "run", "seconds", "last line", title=f"{self.done}{of_all} done, {self.failed} failed")
        for attempt in running:
            name = attempt.run.name if attempt.number == 1 else f"{attempt.run.name} (again)"
            table.add_row(attempt.slot.device, name, f"{attempt.seconds:.0f}", last_line(attempt.run)[:70])
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.update("", refresh=True)
            self._live.stop()
            self._live = None


if __name__ == "__main__":
    run_program(main)
