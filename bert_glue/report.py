"""Reports from finished runs: `python -m bert_glue.report FOLDER...`

One run's folder gets its `report.html` anew, from the files it left. Several folders, or one that holds
runs, get one page over tasks and seeds (`suite_report`). Nothing is computed on a device and no network
is used; every run of `run_glue.py` calls this by itself.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from pathlib import Path
from typing import Any

from bert_glue import svg
from bert_glue.errors import CheckpointError, MachineError, exit_code_of
from bert_glue.launch_results import read_json_object, read_results
from bert_glue.report_analysis import analysis_sections
from bert_glue.report_page import card, duration, fact, page, section, table
from bert_glue.report_words import both
from bert_glue.tasks import TASKS, GlueTask, own_task

_NOISE = 2.0 * 2**0.5  # standard errors of a difference of two scores on samples of one size


def load(folder: Path, name: str) -> dict[str, Any]:
    """A results file of a run, {} where it was not written."""
    path = folder / name
    return read_json_object(path) if path.is_file() else {}


def run_page(folder: Path) -> str:
    """report.html of one run, from the files in its folder.

    Raises:
        MachineError: there are no results.
    """
    results = read_results(folder)
    # Files of an earlier run may lie there too: only what this run did is shown.
    has_scores = f"eval_{results['headline_metric']}" in results
    analysis = load(folder, "analysis.json") if has_scores else {}
    state = load(folder, "trainer_state.json") if "train_steps" in results else {}
    origin = load(folder, "run.json")
    task = TASKS.get(results["task_name"]) or own_task(results["task_name"], (), ())
    title = f"{results['task_name']}: {results['model_name_or_path']}"
    body = (
        f"<h1>{html.escape(title)}</h1>"
        + _facts(results)
        + _cards(task, results, analysis)
        + _comparison(task, results, analysis)
        + section("curves", _curves(results, state.get("log_history", []), analysis))
        + analysis_sections(analysis)
        + _appendix(results, origin)
    )
    return page(title, body)


def _facts(results: dict) -> str:
    sample = f'<p><span class="badge">{both("sample")}</span></p>' if results["sample_data"] else ""
    facts = [
        fact("data", results["data"]),
        fact("device", results["device_name"]),
        f"<li>{both('ranks', n=results['world_size'])}</li>",
        fact("precision", results["precision"]),
        fact("batches", results["batches"]),
        fact("seed", results["seed"]),
    ]
    if results.get("trained", "all") != "all":
        facts.append(fact("trained", results["trained"]))
    if results.get("fallback"):
        facts.append(fact("fallback", results["fallback"]))
    return f'{sample}<ul class="facts">{"".join(facts)}</ul>'


def _splits(results: dict, analysis: dict) -> list[tuple[str, dict, float | None]]:
    """(suffix of keys, analysis, headline value) of each evaluated split."""
    found = analysis.get("splits", {})
    return [
        (part["suffix"], part, results.get(f"eval_{results['headline_metric']}{part['suffix']}"))
        for part in found.values()
    ]


def points(value: float | None, digits: int = 2) -> str:
    """A share as points, x100; "-" for none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _cards(task: GlueTask, results: dict, analysis: dict) -> str:
    cards = []
    for suffix, part, value in _splits(results, analysis):
        below = [f"{html.escape(results['headline_metric'] + suffix.replace('_', ' '))} x100"]
        if part["standard_error"] is not None:
            below.append(both("standard_error", se=points(part["standard_error"])))
        if part["majority"] is not None:
            below.append(both("majority_is", value=points(part["majority"])))
            if value is not None and value <= part["majority"]:
                below.append(f'<span class="bad">{both("at_majority")}</span>')
        reason = results.get(f"eval_{results['headline_metric']}{suffix}_reason")
        below += [html.escape(reason)] if reason else []
        cards.append(card(points(value), *below))
    shown = (
        ("train_samples_per_second", "train_speed", lambda v: f"{v:,.1f}"),
        ("eval_samples_per_second", "eval_speed", lambda v: f"{v:,.1f}"),
        ("epoch", "epochs", lambda v: f"{v:g}"),
        ("train_runtime", "train_time", duration),
        ("e2e_runtime", "whole_time", duration),
    )
    for key, word, text in shown:
        if results.get(key) and (key != "train_runtime" or "train_loss" in results):
            cards.append(card(text(results[key]), both(word)))
    return f'<div class="cards">{"".join(cards)}</div>'


def comparison_rows(task: GlueTask, results: dict, analysis: dict) -> list[list[str | None]]:
    """Cells (HTML) of the table beside published figures: own row (starts with None), majority, published."""
    splits = _splits(results, analysis)
    errors = [part["standard_error"] for _, part, _ in splits]
    own = [value for *_, value in splits]
    speed = results.get("train_samples_per_second")
    device = html.escape(results["device_name"])
    label = both("this_run") + (f" ({both('sample')})" if results["sample_data"] else "")
    rows: list[list[str | None]] = [
        [None, f"{label}, {device}", _pair(own), _pair(errors), "-", "-", "-" if speed is None else f"{speed:,.1f}"]
    ]
    majority = [part["majority"] for _, part, _ in splits]
    if any(value is not None for value in majority):
        rows.append([both("majority"), _pair(majority), "-", *_judged(own, majority, errors), "-"])
    comparable = not results["sample_data"] and not _other_rows(task, results)
    for run in task.published:
        scores = [score / 100 for score in run.scores]
        judged = _judged(own, scores, errors) if comparable else ("-", both("not_comparable"))
        theirs = f"{run.samples_per_second:,.1f}" if run.samples_per_second else "-"
        name = both("published", where=run.where, epochs=run.epochs)
        rows.append([name, _pair(scores), "-", *judged, theirs])
    return rows


def _pair(values: list[float | None]) -> str:
    return " / ".join(points(value) for value in values) or "-"


def _judged(own: list, other: list, errors: list) -> tuple[str, str]:
    """Difference and whether it is noise, for each split."""
    differences, verdicts = [], []
    for mine, theirs, error in zip(own, other, errors, strict=False):
        if mine is None or theirs is None:
            differences.append("-")
            continue
        differences.append(f"{100 * (mine - theirs):+.2f}")
        if error is not None:
            is_noise = abs(mine - theirs) <= _NOISE * error
            key = "noise" if is_noise else "higher" if mine > theirs else "lower"
            style = "soft" if is_noise else "good" if mine > theirs else "bad"
            verdicts.append(f'<span class="{style}">{both(key)}</span>')
    return " / ".join(differences) or "-", " / ".join(dict.fromkeys(verdicts)) or "-"


def _other_rows(task: GlueTask, results: dict) -> tuple[int, int] | None:
    """(evaluated, official) rows of the first split that was not evaluated whole."""
    for split, suffix, _ in task.evaluation:
        rows, official = results.get(f"eval_samples{suffix}"), task.rows.get(split)
        if rows is not None and official and rows != official:
            return rows, official
    return None


def _comparison(task: GlueTask, results: dict, analysis: dict) -> str:
    header = [
        both("run"), both("value", metric=results["headline_metric"]), both("standard_error", se="").rstrip(),
        both("difference"), both("verdict"), both("speed"),
    ]  # fmt: skip
    header[2] = header[2].replace(" </span>", "</span>")
    other = _other_rows(task, results)
    notes = f'<p class="note">{both("noise_rule")}</p>' if task.published else ""
    if other and task.published and not results["sample_data"]:
        notes = f'<p class="note">{both("other_rows", rows=other[0], official=other[1])}</p>' + notes
    return section("compare", table(header, comparison_rows(task, results, analysis), numbers=(1, 2, 3, 5)), notes)


def _curves(results: dict, history: list[dict], analysis: dict) -> str:
    def series(key: str) -> list[tuple[float, float]]:
        return [(e["step"], e[key]) for e in history if e.get(key) is not None]

    metric = f"eval_{results['headline_metric']}"
    measured = series(metric)
    majority = next(iter(analysis.get("splits", {}).values()), {}).get("majority")
    rule = [(measured[0][0], majority), (measured[-1][0], majority)] if measured and majority is not None else []
    charts = [
        svg.lines(
            [svg.Line(series("loss"), "a", "training_line"), svg.Line(series("eval_loss"), "b", "evaluation_line")],
            "loss",
        ),
        svg.lines([svg.Line(series("learning_rate"))], "learning_rate"),
        svg.lines([svg.Line(measured, "b", "evaluation_line"), svg.Line(rule, "rule", "majority")], "metric"),
        svg.lines([svg.Line(series("loss_scale"))], "loss_scale"),
    ]
    drawn = "".join(chart for chart in charts if chart)
    return f'<div class="charts">{drawn}</div>' if drawn else f"<p>{both('no_curve')}</p>"


def _appendix(results: dict, origin: dict) -> str:
    def text(value: Any) -> str:
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return f"<code>{html.escape(shown)}</code>"

    def block(key: str, rows: dict) -> str:
        cells = [(html.escape(name), text(value)) for name, value in rows.items()]
        return f"<details><summary>{both(key)}</summary>{table((both('name'), both('what')), cells)}</details>"

    flat = {name: value for name, value in results.items() if not isinstance(value, dict)}
    seconds = {name: value and round(value, 2) for name, value in results.get("seconds", {}).items()}
    kept = {name: value for name, value in origin.items() if name != "arguments"}
    return block("everything", flat) + block("seconds", seconds) + (block("origin", kept) if kept else "")


def write_page(path: Path, text: str) -> None:
    """Raises CheckpointError where it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 usage, 4 no results, 6 not written."""
    parser = argparse.ArgumentParser(prog="python -m bert_glue.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run, or a folder that holds runs")
    parser.add_argument("--output", type=Path, help="default: report.html in the folder; in . for several folders")
    args = parser.parse_args(argv)

    def write() -> int:
        from bert_glue.suite_report import find_runs, suite_page

        missing = [str(folder) for folder in args.folders if not folder.is_dir()]
        if missing:
            raise MachineError(f"{', '.join(missing)}: no such folder")
        is_one_run = len(args.folders) == 1 and (args.folders[0] / "all_results.json").is_file()
        target = args.output or (args.folders[0] if len(args.folders) == 1 else Path()) / "report.html"
        text = run_page(args.folders[0]) if is_one_run else suite_page(*find_runs(args.folders))
        write_page(target, text)
        print(f"wrote {target}")
        return 0

    return exit_code_of(write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
