"""Runs GLUE tasks x seeds x learning rates as a queue: one run per device, resumable, with a table and a summary.

    python -m bert_glue.sweep --sample --tasks mrpc,rte --seeds 1-3
    python -m bert_glue.sweep --model ./bert-large-cased --devices npu:0,npu:1 -- --bf16
    python -m bert_glue.sweep --tasks own --train_file reviews.csv --validation_file later.csv \\
        --text_column_names text --label_column_name label --model bert-base-cased --learning_rates 2e-5,3e-5

Do not train one small task on eight devices: a global batch of 256 leaves only a few hundred updates, and
the published eight-device scores are 3 to 10 points below those of one device. Eight one-device runs take
the same time and give eight full scores, and a single seed says little anyway.

A sweep can be stopped in any way; signals save checkpoints. The same command continues it: finished runs are
kept, and unfinished ones resume. Exit codes: 0 every run is done; 2 usage error, nothing was started; 8 a mean
misses a bound of --expect; 129, 130, 143 ended by a signal. If runs failed, the code is theirs if all of them
share one, and else 1.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import deque
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_glue.config.command_line import CommandParser
from bert_glue.config.expectations import Expectation, missed, read_expectations
from bert_glue.config.metric_checks import metric_names
from bert_glue.config.values import read_seconds
from bert_glue.errors import (
    CheckpointError,
    ExpectationError,
    UsageError,
    UserError,
    exit_code_of,
    first_line,
    print_lines,
    printable,
    run_program,
)
from bert_glue.storage.lock import FolderLock, wait_until_free
from bert_glue.sweep.executors import choice
from bert_glue.sweep.executors.interface import Event, EventKind, Job
from bert_glue.sweep.own_data import DATA_FLAGS, add_flags, check_flags, data_flags, read_own_data
from bert_glue.sweep.plan import Suite, SweepRun, plan, seeds_of, tasks_of
from bert_glue.sweep.scheduler import Queue, last_line
from bert_glue.sweep.side_by_side import read_jobs
from bert_glue.sweep.summary import best_mean, lines, summarise, write
from bert_glue.tasks import OWN, GlueTask


class Listed:
    """A source with a fixed list of runs."""

    def __init__(self, runs: list[SweepRun]):
        self._waiting = deque(runs)

    def next_run(self) -> SweepRun | None:
        """The next run of the list."""
        return self._waiting.popleft() if self._waiting else None

    def ended(self, run: SweepRun, is_done: bool) -> None:
        """Does nothing, because results do not change the list."""


def main(argv: list[str]) -> int:
    """Runs a sweep and returns its exit code."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, settings = choice.without_slurm_settings(argv[:end])
    args = _parser().parse_args(own)
    args.slurm_settings = settings
    epochs = (f"--num_train_epochs={args.train_epochs}",) if args.train_epochs else ()
    extra = (*epochs, *argv[end + 1 :])
    return exit_code_of(lambda: _sweep(args, extra))


def _parser() -> CommandParser:
    parser = CommandParser(
        same={"model_name_or_path": "model", "learning_rate": "learning_rates", "seed": "seeds",
              "task_name": "tasks", "device": "devices"},
        passes_on=True, prog="bert_glue.sweep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Flags of run_glue.py follow -- and apply to all runs.",
    )  # fmt: skip
    add = parser.add_argument
    # --TASK, --device and --train_epochs are the names of the other launchers.
    add("--tasks", "--TASK", metavar="LIST", help="comma-separated; all (default); or own: the data of --train_file")
    add("--seeds", default="1-3", metavar="LIST", help="seeds, such as 1,2,7 or 1-5; default 1-3")
    add("--learning_rates", default="", metavar="LIST", help="learning rates to compare; default: that of the recipe")
    add("--sample", action="store_true", help="generated sample data (not GLUE); a tiny BERT unless --model is given")
    add("--data_path", metavar="FOLDER", help="the original GLUE folder; default: the data of the hub")
    add("--model", "--model_name_or_path", metavar="NAME", help="folder or hub name; default: bert-large-cased")
    add("--recipe", metavar="NAME", help="reference (default), stable, ... or a config file; own data has no default")
    add("--output_dir", default="output/sweep", metavar="FOLDER", help="folder of all runs; default: output/sweep")
    add("--train_epochs", metavar="N", help="--num_train_epochs of all runs; default: that of the recipe")
    add(
        "--devices",
        "--device",
        default="auto",
        metavar="LIST",
        help="such as npu:0,npu:1; auto (default): all of the best kind",
    )
    add(
        "--jobs",
        "--runs_per_device",
        type=read_jobs,
        metavar="N",
        help="runs at once per device, which share its threads; auto: on a GPU as many as fit, up to 4, elsewhere 1; "
        "default: auto with --devices auto, else 1",
    )
    add("--grace", type=read_seconds, default=300.0, metavar="SECONDS", help="time to save after a signal; default 300")
    add("--keep_checkpoints", action="store_true", help="keep checkpoints of finished runs; default: only their models")
    add("--expect", nargs="+", default=[], metavar="BOUND", help="bounds for means over seeds, such as 'mrpc.f1>=0.88'")
    add("--dry_run", action="store_true", help="list the runs with their progress, and start nothing")
    add("--search", type=int, metavar="N", help="search settings with N Optuna trials per task")
    add("--storage", metavar="URL", help="Optuna storage, which machines can share; default: sqlite in --output_dir")
    add("--storage_timeout", type=read_seconds, metavar="SECONDS", help="time for an answer of --storage; default 60")
    add("--space", nargs="+", default=[], metavar="FLAG=LOW:HIGH", help="ranges of the search; also FLAG=A,B,C")
    add_flags(parser)
    choice.add_flags(parser)
    return parser


def _sweep(args: argparse.Namespace, extra: tuple[str, ...]) -> int:
    args.tasks = args.tasks or (OWN if any(getattr(args, name) for name in DATA_FLAGS) else "all")
    check_flags(args, extra)
    choice.check_flags(args)
    suite = _suite(args, extra)
    tasks, seeds = tasks_of(args.tasks), seeds_of(args.seeds)
    rates = [rate.strip() for rate in args.learning_rates.split(",")] if args.learning_rates else []
    if args.tasks == OWN:
        chosen = {"learning_rate": rates[0]} if rates else {}
        own = read_own_data(suite.run(tasks[0], seeds[0], chosen).flags)
        print_lines(*own.lines)
        suite, tasks = replace(suite, data_sha256=own.sha256), [own.task]
    _check_search_flags(args)
    if args.search is not None:
        from bert_glue.sweep.search import STORAGE_SECONDS, Search, read_space

        space = read_space(args.space, args.sample)
        source = Search(suite, tasks, seeds, args.search, args.storage, space, args.storage_timeout or STORAGE_SECONDS)
        runs = source.runs  # grows while the search goes on
    else:
        runs = plan(suite, tasks, seeds, rates)
    bounds = _bounds(args.expect, tasks)
    if args.dry_run:
        if args.search is not None:
            print(f"{args.search} trials per task within {source.space}")
        print_lines(*map(_state, runs))
        return 0
    executor, why = choice.executor_of(args, suite.run(tasks[0], seeds[0], {}))
    print_lines(*filter(None, [why]))
    with FolderLock(suite.output_dir), closing(executor):
        executor.open(suite.output_dir)
        if args.search is not None:
            source.open()
        if not executor.outlives_driver:  # after a sweep is killed, its runs may still be saving their checkpoints
            wait_until_free([run.folder for run in runs], args.grace)
        waiting = [run for run in runs if run.results() is None]
        found = len(runs) - len(waiting)
        rest = f"{len(waiting)} to do"
        if args.search is not None:
            rest = f"{args.search} trials per task within {source.space}"
        print(f"{found} runs are already done; {rest}; on {executor.where}")
        table = SweepTable(None if args.search is not None else len(runs), found)
        supply = source if args.search is not None else Listed(waiting)
        queue = Queue(supply, executor, args.grace, table.tell, table.show)
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


def _check_search_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for a number below 1, and for flags that need or exclude `--search`."""
    for name in ("jobs", "search"):
        number = getattr(args, name)
        if isinstance(number, int) and number < 1:
            raise UsageError(f"--{name} {number} is below the minimum of 1")
    if args.search is not None and args.learning_rates:
        raise UsageError("--learning_rates and --search exclude each other; --space sets the rates of a search")
    if args.search is None and (args.storage or args.space or args.storage_timeout):
        raise UsageError("--storage, --storage_timeout and --space need --search N")


def _write_report(output_dir: Path) -> None:
    """Writes report.html with all finished runs. The sweep is complete without it, so a failure only prints a note."""
    from bert_glue.report.page import write_page
    from bert_glue.report.suite_page import find_runs, suite_page

    try:
        write_page(output_dir / "report.html", suite_page(find_runs([output_dir])))
    except UserError as error:
        print_lines(f"note: report.html was not written: {first_line(error)}", file=sys.stderr)


def _close(queue: Queue, summary: dict, output_dir: Path) -> int:
    """Prints the last lines and returns the exit code."""
    for name, study in summary.get("search", {}).items():
        if "best" in study:
            best = ", ".join(f"{flag} {value}" for flag, value in study["best"].items())
            print(f"best of {study['COMPLETE']} trials, {name}: {100 * study['best_value']:.2f} with {best}")
    print_lines(*lines(summary), f"all figures: {output_dir}/summary.json, summary.csv; report.html")
    for folder, reason in queue.failures.items():
        print_lines(f"failed: {folder}: {reason}", file=sys.stderr)
    if queue.stop_signal is not None:
        print("stopped: the same command continues the sweep", file=sys.stderr)
        return 128 + queue.stop_signal
    codes = set(queue.codes.values())
    if not codes:
        return 0
    return codes.pop() if len(codes) == 1 else 1


def _bounds(texts: list[str], tasks: list[GlueTask]) -> list[tuple[GlueTask, Expectation]]:
    """The bounds of --expect, each with its task.

    Raises:
        UsageError: a text is not a bound, or names none of the tasks.
    """
    found = []
    for text in ",".join(texts).split(",") if texts else []:
        name = text.strip().partition(".")[0]
        task = next((task for task in tasks if task.name == name), tasks[0])
        if len(tasks) > 1 and task.name != name:
            raise UsageError(f"--expect {text}: name the task of the bound, as in {task.name}.{task.headline}>=0.8")
        try:
            found += [(task, bound) for bound in read_expectations(text, task.name, metric_names(task))]
        except ValueError as error:
            raise UsageError(f"--expect: {error}") from None
    return found


def _gate(bounds: list[tuple[GlueTask, Expectation]], runs: list[SweepRun]) -> int:
    """The exit code: 0, or 8 if a mean misses a bound. Prints a line for each missed bound."""
    judged = [
        bound.judge({bound.key: best_mean([run for run in runs if run.task == task], bound.key, bound.is_upper)})
        for task, bound in bounds
    ]
    for line in missed(judged):
        print(f"error: mean over seeds: {line}", file=sys.stderr)
    return ExpectationError.exit_code if missed(judged) else 0


def _suite(args: argparse.Namespace, extra: tuple[str, ...]) -> Suite:
    if args.sample and args.data_path:
        raise UsageError("--sample and --data_path exclude each other; give one source of data")
    source = ["--sample"] if args.sample else []
    if args.data_path:
        source.append(f"--data_path={args.data_path}")
    source += data_flags(args)
    recipe = args.recipe or (None if args.tasks == OWN else "reference")
    local = Path(__file__).resolve().parents[2] / "bert-large-cased"
    default = str(local) if local.is_dir() else "google-bert/bert-large-cased"
    model = args.model or (None if args.sample else default)
    return Suite(Path(args.output_dir), model, tuple(source), extra, recipe)


def _state(run: SweepRun) -> str:
    state = "to continue" if run.is_started() else "to start"
    if run.results() is not None:
        state = "done"
    return f"{state}: {run.name}: run_glue.py {shlex.join(run.flags)}"


def _drop_checkpoints(runs: list[SweepRun]) -> None:
    """Deletes the checkpoints of finished runs, which only serve to resume a run."""
    folders = [folder for run in runs if run.results() is not None for folder in run.folder.glob("checkpoint-*")]
    if folders:
        from bert_glue.storage.checkpoint import remove, step_of

        for folder in folders:
            if step_of(folder) >= 0:
                remove(folder)


_REFRESH_SECONDS = 1.0


class SweepTable:
    """Prints the events of a sweep, and on a terminal a live table of the running ones.

    Args:
        total: the number of runs. None in a search, where it is not fixed.
        done: how many of them were finished earlier.
        is_live: whether to show the table. None: only if stderr is a terminal.
    """

    def __init__(self, total: int | None, done: int = 0, is_live: bool | None = None):
        self.total, self.done, self.failed = total, done, 0
        self._live: Any = None
        self._shown = 0.0
        if sys.stderr.isatty() if is_live is None else is_live:
            from rich.console import Console
            from rich.live import Live

            # No refresh thread: the queue forks, and forking a process with threads can deadlock.
            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()

    def tell(self, event: Event) -> None:
        """Counts and prints one event."""
        self.done += event.kind is EventKind.DONE
        self.failed += event.kind is EventKind.FAILED
        of_all = "" if self.total is None else f"[{self.done}/{self.total}] "
        if self._live is None:
            print_lines(f"{of_all}{event.text}")
        else:
            self._live.console.print(printable(f"{of_all}{event.text}"), markup=False, highlight=False)

    def show(self, running: list[Job]) -> None:
        """Redraws the table, at most once per second."""
        if self._live is None or time.monotonic() - self._shown < _REFRESH_SECONDS:
            return
        from rich.table import Table

        self._shown = time.monotonic()
        of_all = "" if self.total is None else f" of {self.total}"
        table = Table("device", "run", "seconds", "last line", title=f"{self.done}{of_all} done, {self.failed} failed")
        for job in running:
            name = job.run.name if job.number == 1 else f"{job.run.name} (again)"
            line = last_line(job.run)[:70] if job.place else ""
            table.add_row(job.place or "waiting", name, f"{job.seconds:.0f}", line)
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Removes the table from the terminal."""
        if self._live is not None:
            self._live.update("", refresh=True)
            self._live.stop()
            self._live = None


if __name__ == "__main__":
    run_program(main)
