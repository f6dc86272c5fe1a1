"""Mean, standard deviation and best score over the seeds of each task, beside the score of a constant prediction."""

from __future__ import annotations

import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any

from bert_glue import result_keys as keys
from bert_glue.evaluation.collapse import collapse_reason
from bert_glue.storage.files import without_formula, write_json, write_whole
from bert_glue.sweep.plan import SweepRun
from bert_glue.tasks import EvaluationSplit

COLUMNS = (
    "task", "split", "trial", "chosen", "metric", "runs", "missing", "mean", "std", "standard_error_of_mean", "best",
    "best_seed", "worst", "majority_baseline", "standard_error_of_dev", "collapsed_seeds", "mean_without_collapsed",
    "samples_per_second", "sample_data",
)  # fmt: skip


def summarise(runs: list[SweepRun], failures: dict[Path, str]) -> dict[str, Any]:
    """All figures of a sweep.

    Args:
        runs: all runs, finished or not.
        failures: folder -> reason why its run failed.

    Returns:
        `groups`: one entry per task, evaluation split and choice of flags. Scores are in points (x100), and null if
        there are too few runs. `standard_error_of_dev` is the standard error of the metric that comes from the size of
        the dev set alone. `runs`: one entry per run, with its state.
    """
    found = {run.folder: run.results() for run in runs}
    groups: dict[tuple[str, tuple], list[SweepRun]] = {}
    for run in runs:
        key = (run.task.name, tuple(run.chosen.items()), run.trial)
        groups.setdefault(key, []).append(run)
    return {
        "groups": [
            _group(members, split, found) for members in groups.values() for split in members[0].task.evaluation
        ],
        "runs": [_row(run, found[run.folder], failures.get(run.folder)) for run in runs],
    }


def best_mean(runs: list[SweepRun], key: str, is_low: bool = False) -> float | None:
    """The best mean over seeds of one entry of all_results.json, among the settings of one task.

    Args:
        is_low: the lowest is the best, as of a loss; else the highest.

    None if no setting has this entry in all of its runs.
    """
    found: dict[tuple, list[float | None]] = {}
    for run in runs:
        found.setdefault((run.trial, *run.chosen.items()), []).append((run.results() or {}).get(key))
    means = [statistics.fmean(values) for values in found.values() if None not in values]
    return (min if is_low else max)(means, default=None)


def _group(members: list[SweepRun], split: EvaluationSplit, found: dict[Path, dict[str, Any] | None]) -> dict[str, Any]:
    task = members[0].task
    done = [(run.seed, run, found[run.folder]) for run in members if found[run.folder] is not None]
    key = keys.evaluation_key(task.headline, split.key_suffix)
    # A metric without a value (null) comes from a collapsed run and does not enter the mean.
    scored = [(100 * results[key], seed) for seed, _, results in done if results.get(key) is not None]
    lost = [seed for seed, run, results in done if collapse_reason(results)]
    values, sound = [v for v, _ in scored], [v for v, seed in scored if seed not in lost]
    speeds = [speed for _, _, r in done if (speed := r.get(keys.TRAIN_SAMPLES_PER_SECOND)) is not None]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    given = [(seed, r.get(keys.standard_error_key(task.headline, split.key_suffix))) for seed, _, r in done]
    # A perfect score has a true standard error of 0. The 0 of a constant prediction means nothing and is left out.
    errors = [error for seed, error in given if error is not None and (error > 0 or seed not in lost)]
    baseline_key = keys.evaluation_key(keys.MAJORITY_BASELINE, split.key_suffix)
    # All seeds share one value, unless each holds out different rows of own data.
    baselines = {found for _, _, r in done if (found := r.get(baseline_key)) is not None}
    baseline = statistics.fmean(baselines) if baselines else None
    return {
        "task": task.name,
        "split": split.name,
        "trial": members[0].trial,
        "chosen": dict(members[0].chosen),
        "metric": task.headline,
        "runs": len(values),
        "missing": len(members) - len(values),
        "mean": statistics.fmean(values) if values else None,
        "std": deviation,
        "standard_error_of_mean": None if deviation is None else deviation / math.sqrt(len(values)),
        "best": max(values, default=None),
        "best_seed": max(scored, default=(None, None))[1],
        "worst": min(values, default=None),
        "majority_baseline": None if baseline is None else 100 * baseline,
        "standard_error_of_dev": 100 * statistics.fmean(errors) if errors else None,
        "collapsed_seeds": lost,
        "mean_without_collapsed": statistics.fmean(sound) if sound else None,
        "samples_per_second": statistics.fmean(speeds) if speeds else None,
        "sample_data": any(results.get("sample_data") for _, _, results in done),
    }


def _row(run: SweepRun, results: dict[str, Any] | None, failure: str | None) -> dict[str, Any]:
    if results is not None:
        state = "done"
    elif failure:
        state = "failed"
    else:
        state = "unfinished" if run.is_started() else "not started"
    row = {"task": run.task.name, "seed": run.seed, "chosen": run.chosen, "folder": str(run.folder), "state": state}
    if failure:
        row["failure"] = failure
    if results is not None:
        row["metrics"] = {
            f"{metric}{split.key_suffix}": results.get(keys.evaluation_key(metric, split.key_suffix))
            for split in run.task.evaluation
            for metric in run.task.metrics
        }
        row["collapsed"] = collapse_reason(results)
        row["seconds"] = results.get(keys.E2E_RUNTIME)
        row["device"] = results.get("device_name")
        row["precision"] = results.get("precision")
    return row


def write(output_dir: Path, summary: dict[str, Any]) -> None:
    """Writes `summary.json` and `summary.csv`, each in one step, so that no reader meets half a file.

    Raises:
        OSError: a file cannot be written.
    """

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for group in summary["groups"]:
        writer.writerow([_cell(group[column]) for column in COLUMNS])
    write_json(output_dir / "summary.json", summary)
    write_whole(output_dir / "summary.csv", table.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        value = [f"{name}={text}" for name, text in value.items()]
    text = " ".join(map(str, value)) if isinstance(value, list) else value
    return without_formula(text) if isinstance(text, str) else text


def lines(summary: dict[str, Any]) -> list[str]:
    """The groups as a plain table, with notes below."""
    header = ("task", "metric", "runs", "mean", "std", "best", "majority", "dev error", "collapsed seeds")
    rows = [header]
    for group in summary["groups"]:
        name = " ".join([group["task"], *(f"{k}={v}" for k, v in group["chosen"].items())])
        if group["trial"] is not None:
            name = f"{group['task']} trial {group['trial']}"
        if group["split"] != "validation":
            name += f" {group['split'].removeprefix('validation_')}"
        figures = (_points(group[k]) for k in ("mean", "std", "best", "majority_baseline", "standard_error_of_dev"))
        of_all = f"{group['runs']}/{group['runs'] + group['missing']}"
        lost = ",".join(map(str, group["collapsed_seeds"])) or "-"
        rows.append((name, group["metric"], of_all, *figures, lost))
    widths = [max(len(row[at]) for row in rows) for at in range(len(header))]
    found = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(group["sample_data"] for group in summary["groups"]):
        found.append("sample data, not GLUE")
    found.append("all figures in points (x100); majority: the metric of a constant prediction")
    found.append("dev error: standard error of the metric due to the size of the dev set, mean over runs")
    return found


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
