"""One page over one finished run: score, facts, curves, analysis and settings."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from bert_glue.errors import CheckpointError
from bert_glue.report import charts as report_charts
from bert_glue.report.page import card, duration, fact, page, section, table
from bert_glue.report.sections import analysis_sections, comparison, points, splits_of
from bert_glue.report.words import both
from bert_glue.results.model_card import short_name
from bert_glue.storage.files import read_json_object, read_results, write_whole
from bert_glue.tasks import TASKS, GlueTask, own_task


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
    title = f"{results['task_name']}: {short_name(results['model_name_or_path'])}"
    body = (
        f"<h1>{html.escape(title)}</h1>"
        + _facts(results)
        + _cards(task, results, analysis)
        + comparison(task, results, analysis)
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


def _cards(task: GlueTask, results: dict, analysis: dict) -> str:
    cards = []
    for suffix, part, value in splits_of(results, analysis):
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
    for key, word in (("train_samples_per_second", "train_speed"), ("eval_samples_per_second", "eval_speed")):
        if results.get(key):
            cards.append(card(f"{results[key]:,.1f}", both(word)))
    if results.get("e2e_runtime"):
        below = [both("whole_time")]
        if "train_loss" in results:
            time, epochs = duration(results["train_runtime"]), f"{results['epoch']:.3g}"
            below.append(both("train_time", time=time, epochs=epochs))
        cards.append(card(duration(results["e2e_runtime"]), *below))
    return f'<div class="cards">{"".join(cards)}</div>'


def _curves(results: dict, history: list[dict], analysis: dict) -> str:
    def series(key: str) -> list[tuple[float, float]]:
        return [(e["step"], e[key]) for e in history if e.get(key) is not None]

    metric = f"eval_{results['headline_metric']}"
    measured = series(metric)
    majority = next(iter(analysis.get("splits", {}).values()), {}).get("majority")
    rule = [(measured[0][0], majority), (measured[-1][0], majority)] if measured and majority is not None else []
    scale = series("loss_scale")
    charts = [
        report_charts.lines(
            [
                report_charts.Line(series("loss"), "a", "training_line"),
                report_charts.Line(series("eval_loss"), "b", "evaluation_line"),
            ],
            "loss",
        ),
        report_charts.lines([report_charts.Line(series("learning_rate"))], "learning_rate"),
        report_charts.lines(
            [report_charts.Line(measured, "b", "evaluation_line"), report_charts.Line(rule, "rule", "majority")],
            "metric",
        ),
        report_charts.lines(
            [report_charts.Line(scale)] if any(value != 1.0 for _, value in scale) else [], "loss_scale"
        ),
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
        write_whole(path, text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
