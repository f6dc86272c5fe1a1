"""One page over many runs: scores of each task over seeds, collapsed ones, and what they took."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path, PurePath
from statistics import fmean, stdev

from bert_glue.errors import MachineError
from bert_glue.report import charts as report_charts
from bert_glue.report.page import duration, page, section, table
from bert_glue.report.words import both
from bert_glue.storage.files import read_results
from bert_glue.tasks import TASKS


@dataclass(frozen=True)
class SuiteRun:
    """One finished run.

    Args:
        value: headline metric of the first evaluated split, 0..1 (correlations -1..1); None where it has none.
        majority: the same of the most frequent class; None where unknown.
    """

    folder: Path
    results: dict
    value: float | None
    majority: float | None

    @property
    def group(self) -> tuple[str, str]:
        """(task, model): runs that differ in their seed only."""
        return self.results["task_name"], PurePath(self.results.get("model_name_or_path") or "").name

    @property
    def has_collapsed(self) -> bool:
        """True if it learned nothing: no value, or none above the most frequent class."""
        is_constant = self.value is None or bool(self.results.get("eval_collapsed"))
        return is_constant or (self.majority is not None and self.value <= self.majority)


def find_runs(folders: list[Path]) -> tuple[list[SuiteRun], list[Path]]:
    """Runs in the folders, at any depth, and output folders without results.

    Raises:
        MachineError: there is no finished run.
    """
    finished = sorted({path.parent for folder in folders for path in folder.rglob("all_results.json")})
    begun = {path.parent for folder in folders for path in folder.rglob(".lock")}
    unfinished = sorted(path for path in begun - set(finished) if not any(path in run.parents for run in finished))
    runs = [run for folder in finished if (run := _read(folder)) is not None]
    if not runs:
        raise MachineError(f"{', '.join(map(str, folders))}: no run with an evaluation (all_results.json)")
    return runs, unfinished


def _read(folder: Path) -> SuiteRun | None:
    """A run that evaluated, else None."""
    results = read_results(folder)
    key = f"eval_{results.get('headline_metric')}"
    if key not in results:
        return None
    return SuiteRun(folder, results, results[key], results.get("eval_majority_baseline"))


def suite_page(runs: list[SuiteRun], unfinished: list[Path]) -> str:
    """report.html over the runs."""
    groups: dict[tuple[str, str], list[SuiteRun]] = {}
    for run in sorted(runs, key=lambda run: (_order(run), run.group, run.results.get("seed", 0))):
        groups.setdefault(run.group, []).append(run)
    tasks = {task for task, _ in groups}
    title = both("suite", runs=len(runs), tasks=len(tasks))
    total = sum(run.results.get("e2e_runtime") or 0.0 for run in runs)
    sample = any(run.results.get("sample_data") for run in runs)
    left = "".join(f"<li><code>{html.escape(str(path))}</code></li>" for path in unfinished)
    body = (
        f"<h1>{title}</h1>"
        + (f'<p><span class="badge">{both("sample")}</span></p>' if sample else "")
        + f"<p>{both('total_time', time=duration(total))}</p>"
        + section("overview", _overview(groups), f'<p class="note">{both("collapsed_how")}</p>')
        + section("boxes", _boxes(groups))
        + section("unfinished", f"<ul>{left}</ul>" if left else "")
        + section("every_run", _every_run(groups))
    )
    return page(f"bert_glue: {len(runs)} runs", body)


def _order(run: SuiteRun) -> int:
    names = list(TASKS)
    return names.index(run.results["task_name"]) if run.results["task_name"] in names else len(names)


def _values(runs: list[SuiteRun]) -> list[float]:
    return [100 * run.value for run in runs if run.value is not None]


def _overview(groups: dict[tuple[str, str], list[SuiteRun]]) -> str:
    keys = (
        "task",
        "runs",
        "mean",
        "deviation",
        "range",
        "majority",
        "collapsed",
        "all_published",
        "mean_time",
        "speed",
    )
    rows = [_summary(*group, runs) for group, runs in groups.items()]
    return table([both(key) for key in keys], rows, numbers=range(1, len(keys)))


def _published(task: str, runs: list[SuiteRun]) -> list[float]:
    """Published figures x100 that these runs can be held against."""
    is_glue = task in TASKS and not runs[0].results.get("sample_data")
    return [run.scores[0] for run in TASKS[task].published] if is_glue else []


def _majority(runs: list[SuiteRun]) -> float | None:
    return next((100 * run.majority for run in runs if run.majority is not None), None)


def _summary(task: str, model: str, runs: list[SuiteRun]) -> list[str]:
    values, published, majority = _values(runs), _published(task, runs), _majority(runs)
    collapsed = sum(run.has_collapsed for run in runs)
    times = [run.results["e2e_runtime"] for run in runs if run.results.get("e2e_runtime")]
    speeds = [s for run in runs if (s := run.results.get("train_samples_per_second"))]
    metric = runs[0].results["headline_metric"]
    return [
        f"<b>{html.escape(task)}</b><br><small>{html.escape(metric)} x100<br>{html.escape(model)}</small>",
        str(len(runs)),
        f"<b>{fmean(values):.2f}</b>" if values else "-",
        f"{stdev(values):.2f}" if len(values) > 1 else "-",
        _range(values),
        "-" if majority is None else f"{majority:.2f}",
        f'<span class="bad">{collapsed}</span>' if collapsed else "0",
        _range(published),
        duration(fmean(times)) if times else "-",
        f"{fmean(speeds):,.1f}" if speeds else "-",
    ]


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} - {max(values):.2f}" if values else "-"


def _boxes(groups: dict[tuple[str, str], list[SuiteRun]]) -> str:
    """A chart a task, a row a model: scores of different tasks share no scale."""
    charts = []
    for task in dict.fromkeys(task for task, _ in groups):
        found = {model: runs for (name, model), runs in groups.items() if name == task and _values(runs)}
        if found:
            rows = [_box_row(model[:14] if len(found) > 1 else "", task, runs) for model, runs in found.items()]
            metric = next(iter(found.values()))[0].results["headline_metric"]
            charts.append(f"<div><h3>{html.escape(f'{task}, {metric}')} x100</h3>{report_charts.boxes(rows)}</div>")
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _box_row(name: str, task: str, runs: list[SuiteRun]) -> tuple:
    seeds = [(100 * run.value, run.has_collapsed) for run in runs if run.value is not None]
    return name, seeds, _majority(runs), _published(task, runs)


def _every_run(groups: dict[tuple[str, str], list[SuiteRun]]) -> str:
    rows = []
    for (task, _), runs in groups.items():
        for run in runs:
            value = "-" if run.value is None else f"{100 * run.value:.2f}"
            shown = f'<span class="bad">{value} ({both("collapsed")})</span>' if run.has_collapsed else value
            seconds = run.results.get("e2e_runtime")
            rows.append(
                [
                    html.escape(task), str(run.results.get("seed", "-")), shown,
                    duration(seconds) if seconds else "-", html.escape(str(run.results.get("device_name"))),
                    f"<code>{html.escape(str(run.folder))}</code>",
                ]
            )  # fmt: skip
    keys = ("task", "seed", "what", "whole_time", "device", "folder")
    return table([both(key) for key in keys], rows, numbers=(1, 2, 3))
