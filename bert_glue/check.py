"""`bert-glue check RUN...` compares finished runs with a baseline of `configs/baselines`, or makes a baseline.

    bert-glue check OUTPUT                        compare with configs/baselines/<device>.json
    bert-glue check OUTPUT --baseline FILE        compare with a file, which may be an earlier run's perf.json
    bert-glue check OUTPUT... --write FILE        make FILE from these runs, or add them to it

Scores are compared if data, model, samples per step, learning rate and epochs are those of the baseline. Speeds are
compared if device and batches are. Runs that differ only in their seed are compared by their mean.

A baseline file is `{"format": 1, "entries": [...]}`. An entry is a perf.json with more fields in its `setup`, and with
`metrics`.
"""

from __future__ import annotations

import argparse
import json
from enum import Enum
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from bert_glue import result_keys as keys
from bert_glue.config.command_line import CommandParser
from bert_glue.config.files import FOLDER as CONFIGS
from bert_glue.errors import (
    BaselineError,
    CheckpointError,
    ExpectationError,
    MachineError,
    UsageError,
    exit_code_of,
    print_lines,
    run_program,
)
from bert_glue.evaluation.collapse import collapse_reason
from bert_glue.results.perf import FORMAT, SETUP, TOLERANCE, setup_of
from bert_glue.results.records import is_number
from bert_glue.storage.files import RESULTS_FILE, json_object, read_results, write_json
from bert_glue.tasks import TASKS

# A score is missed if it is more than two errors below the mean. One sound run in forty would miss it.
_ERRORS = 2.0


class Verdict(Enum):
    """The outcome of comparing a figure with the baseline; the value is its word in the table."""

    OK = "ok"
    MISSED = "MISSED"
    SLOW = "SLOW"
    NOT_COMPARED = "not compared"


class Row(NamedTuple):
    """One line of the table; `reason` says why the figure was not compared."""

    task: str
    figure: str
    value: str
    wanted: str
    verdict: Verdict
    reason: str = ""

    def cells(self) -> tuple[str, ...]:
        """The line's texts, one per column."""
        reason = f": {self.reason}" if self.reason else ""
        return self.task, self.figure, self.value, self.wanted, self.verdict.value + reason


def check(group: Group, entries: list[dict[str, Any]]) -> list[Row]:
    """The rows of one group: its scores and speed, beside those of the nearest entry for its task."""
    task = group.setup["task_name"]
    of_task = [entry for entry in entries if entry["setup"].get("task_name") == task]
    if not of_task:
        return [Row(task, "-", "-", "-", Verdict.NOT_COMPARED, "the baseline does not have this task")]
    rows = []
    if scored := [entry for entry in of_task if entry.get("metrics")]:
        nearest, differences = _nearest(scored, group.setup, DECIDES_SCORES)
        rows += [_score_row(group, key, band, differences) for key, band in nearest["metrics"].items()]
    if timed := [entry for entry in of_task if entry.get("samples_per_second") is not None]:
        nearest, differences = _nearest(timed, group.setup, DECIDES_SPEED)
        rows.append(_speed_row(group, nearest["samples_per_second"], differences))
    return rows


def _nearest(entries: list[dict[str, Any]], setup: dict[str, Any], names: tuple[str, ...]) -> tuple[dict, list[str]]:
    """The entry with the fewest differences in `names`, and these differences."""
    found = [(_differences(entry, setup, names), entry) for entry in entries]
    differences, nearest = min(found, key=lambda pair: len(pair[0]))
    return nearest, differences


def _differences(entry: dict[str, Any], setup: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """The `names` whose values differ in the entry. Names that it leaves out do not count."""
    known = entry["setup"]
    other = [name for name in names if name in known and not _same(known[name], setup.get(name))]
    return [f"{name} {known[name]!r}, here {setup.get(name)!r}" for name in other]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and is_number(one) and is_number(other):
        return abs(one - other) <= 1e-3 * abs(one)
    return one == other


def _score_row(group: Group, key: str, band: dict[str, Any], differences: list[str]) -> Row:
    task, least, value = (
        group.setup["task_name"],
        band["mean"] - _ERRORS * band["error"],
        group.mean(keys.evaluation_key(key)),
    )
    wanted = f"{band['mean']:.4f} +- {band['error']:.4f}, at least {least:.4f}"
    if value is None:
        return Row(task, key, "null", wanted, Verdict.NOT_COMPARED, "a run does not have this score")
    if differences:
        return Row(task, key, _of(value, group), wanted, Verdict.NOT_COMPARED, "; ".join(differences))
    return Row(task, key, _of(value, group), wanted, Verdict.OK if value >= least else Verdict.MISSED)


def _of(value: float, group: Group, digits: int = 4) -> str:
    return f"{value:.{digits}f}" + (f" (mean of {len(group.runs)})" if len(group.runs) > 1 else "")


def _speed_row(group: Group, speed: float, differences: list[str]) -> Row:
    task, least, value = group.setup["task_name"], (1.0 - TOLERANCE) * speed, group.mean(keys.TRAIN_SAMPLES_PER_SECOND)
    wanted = f"{speed:.1f}, at least {least:.1f}"
    if value is None:
        reason = group.runs[0].get(keys.reason_key(keys.TRAIN_SAMPLES_PER_SECOND)) or "not measured"
        return Row(task, "samples/s", "null", wanted, Verdict.NOT_COMPARED, reason)
    if differences:
        return Row(task, "samples/s", _of(value, group, 1), wanted, Verdict.NOT_COMPARED, "; ".join(differences))
    return Row(task, "samples/s", _of(value, group, 1), wanted, Verdict.OK if value >= least else Verdict.SLOW)


def table(rows: list[Row]) -> list[str]:
    """Rows under their names, in columns."""
    every = [("task", "figure", "run", "baseline", ""), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in every]


def verdict(rows: list[Row]) -> None:
    """Raise the error that the rows amount to.

    Raises:
        ExpectationError: a score was missed, for any speeds.
        BaselineError: a speed was missed.
        UsageError: nothing could be compared.
    """
    bad = [row for row in rows if row.verdict in (Verdict.MISSED, Verdict.SLOW)]
    lines = [f"{row.task}: {row.figure} is {row.value}, the baseline {row.wanted}" for row in bad]
    if any(row.verdict is Verdict.MISSED for row in bad):
        raise ExpectationError("\n".join(lines))
    if bad:
        raise BaselineError("\n".join(lines))
    if not any(row.verdict is Verdict.OK for row in rows):
        raise UsageError("nothing could be compared; give --baseline a file of such runs, or make one with --write")


def default_file(groups: list[Group]) -> Path:
    """`configs/baselines/<device>.json` of the runs' device.

    Raises:
        UsageError: the runs come from several devices, or there is no baseline for their device.
    """
    devices = sorted({group.setup["device"] for group in groups})
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    if len(devices) > 1 or devices[0] not in known:
        raise UsageError(
            f"--baseline is needed: there are baselines for {', '.join(known)}, "
            f"but the runs are from {', '.join(devices)}"
        )
    return FOLDER / f"{devices[0]}.json"


def _run(options: argparse.Namespace) -> int:
    missing = [str(folder) for folder in options.runs if not folder.is_dir()]
    if missing:
        raise UsageError(f"{', '.join(missing)}: no such folder")
    groups = group_runs(options.runs)
    if options.write:
        source = options.source or f"measured on {', '.join(sorted({g.setup['device_name'] for g in groups}))}"
        print_lines(*write_entries(options.write, [entry_of(g, not options.scores_only, source) for g in groups]))
        return 0
    file = options.baseline or default_file(groups)
    entries = read_entries(file)
    rows = [row for group in groups for row in check(group, entries)]
    print_lines(f"baseline: {file}", *table(rows))
    verdict(rows)
    return 0


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 usage, 4 no run found, 6 not written, 8 a score missed, 9 slower by more than 5 %."""
    parser = CommandParser(prog="bert-glue check", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run, or of a suite of runs")
    add("--baseline", type=Path, metavar="FILE", help="default: configs/baselines/<device>.json")
    add("--write", type=Path, metavar="FILE", help="make a baseline from the runs instead, or add them to one")
    add("--scores_only", action="store_true", help="with --write: leave out samples/s, for example on a shared machine")
    add("--source", help="with --write: a note about the source of the figures; default: the device's name")
    options = parser.parse_args(argv)
    if options.write and options.baseline:
        parser.error("--write and --baseline: give only one")
    return exit_code_of(lambda: _run(options))


FOLDER = CONFIGS / "baselines"
# Besides the seed, these decide a score. It should be the same on all devices and in all precisions.
DECIDES_SCORES = ("task_name", "sample_data", "model", "trained", "global_batch_size", "max_seq_length",
                   "doc_stride", "max_windows", "learning_rate", "epoch", keys.TRAIN_SAMPLES,
                   keys.evaluation_key(keys.SAMPLES))  # fmt: skip
DECIDES_SPEED = (*SETUP, "model", "device")


class Group(NamedTuple):
    """Runs that differ only in their seed: their setup and their results."""

    setup: dict[str, Any]
    runs: list[dict[str, Any]]

    def mean(self, key: str) -> float | None:
        """The mean of a figure over the runs; None unless all have it."""
        values = [run.get(key) for run in self.runs]
        return None if None in values else fmean(values)


def group_runs(folders: list[Path]) -> list[Group]:
    """The finished runs in the folders, at any depth.

    Raises:
        MachineError: there is no finished run, or one was not written by this program.
    """
    files = sorted({path.parent for folder in folders for path in folder.rglob(RESULTS_FILE)})
    if not files:
        raise MachineError(f"{', '.join(map(str, folders))}: no finished run (all_results.json)")
    groups: dict[str, Group] = {}
    for folder in files:
        results = read_results(folder)
        unnamed = [name for name in ("headline_metric", "device_name") if not isinstance(results.get(name), str)]
        if unnamed:
            raise MachineError(f"{folder}: all_results.json was not written by this program ({unnamed[0]!r})")
        try:
            setup = setup_of(results)
            setup |= {name: results.get(name) for name in DECIDES_SCORES if name not in setup}
        except (KeyError, TypeError, AttributeError) as error:
            raise MachineError(f"{folder}: all_results.json was not written by this program ({error})") from error
        groups.setdefault(json.dumps(setup, sort_keys=True), Group(setup, [])).runs.append(results)
    return list(groups.values())


def read_entries(file: Path) -> list[dict[str, Any]]:
    """Entries of a baseline; a perf.json is one entry.

    Raises:
        UsageError: it cannot be read, or it is neither a baseline nor a perf.json.
    """
    try:
        found = json_object(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--baseline {file}: cannot be read ({error})") from error
    entries = found.get("entries", [found]) if found.get("format") == FORMAT else None
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise UsageError(f"--baseline {file}: neither a baseline nor a perf.json of this program")
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("setup"), dict):
        return False
    metrics, speed = entry.get("metrics", {}), entry.get("samples_per_second")
    if not isinstance(metrics, dict) or not (speed is None or is_number(speed)):
        return False
    numbers = [band.get(name) for band in metrics.values() if isinstance(band, dict) for name in ("mean", "error")]
    return len(numbers) == 2 * len(metrics) and all(map(is_number, numbers))


def entry_of(group: Group, with_speed: bool, source: str) -> dict[str, Any]:
    """The entry of a baseline for a group of runs.

    Returns:
        `metrics`: headline scores of each labelled split, `mean` and `error`: the deviation over the runs or the
        standard error of the evaluation, whichever is larger, in the metric's unit. `samples_per_second`: mean.

    Raises:
        UsageError: a run learned nothing.
    """
    task = TASKS.get(group.setup["task_name"])
    collapsed = [f"seed {run.get('seed')}" for run in group.runs if collapse_reason(run)]
    if collapsed:
        raise UsageError(f"--write: a run of {group.setup['task_name']} learned nothing ({', '.join(collapsed)})")
    metrics: dict[str, Any] = {}
    headline = group.runs[0]["headline_metric"]
    for suffix in [split.key_suffix for split in task.evaluation] if task else [""]:
        key = keys.evaluation_key(headline, suffix)
        values = [run[key] for run in group.runs if run.get(key) is not None]
        errors = [run.get(keys.standard_error_key(headline, suffix)) or 0.0 for run in group.runs]
        if values:
            spread = stdev(values) * sqrt(1 + 1 / len(values)) if len(values) > 1 else 0.0
            # 0 of n wrong means a rate of up to 3/n (rule of three, Hanley and Lippman-Hand 1983), which is two errors.
            least = 1.5 / (group.runs[0].get(keys.evaluation_key(keys.SAMPLES)) or 1000)
            metrics[headline + suffix] = {
                "mean": fmean(values),
                "error": max(spread, least, *errors),
                "runs": len(values),
            }
    speed = group.mean(keys.TRAIN_SAMPLES_PER_SECOND) if with_speed else None
    return {"setup": group.setup, "metrics": metrics, "samples_per_second": speed, "source": source}


def write_entries(file: Path, new: list[dict[str, Any]]) -> list[str]:
    """Add entries to a baseline, replacing those with the same setup. Returns lines about the changes.

    Raises:
        UsageError: the file exists and is not a baseline.
        CheckpointError: it cannot be written.
    """
    old = read_entries(file) if file.exists() else []
    setups = [entry["setup"] for entry in new]
    kept = [entry for entry in old if entry["setup"] not in setups]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"format": FORMAT, "entries": [*kept, *new]})
    except OSError as error:
        raise CheckpointError(f"--write {file}: {error.strerror}") from error
    except ValueError:  # json does not write them
        raise UsageError(f"--write {file}: it holds a number that is not finite: mend it, or write another") from None
    return [f"wrote {file}: {len(new)} new, {len(old) - len(kept)} replaced, {len(kept)} kept"]


if __name__ == "__main__":
    run_program(main)
