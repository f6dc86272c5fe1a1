"""One page for one finished run: its score, the comparison, the training, and the errors."""

from __future__ import annotations

import re
from pathlib import Path

from bert_glue import result_keys as keys
from bert_glue.errors import MachineError
from bert_glue.report import charts, sections
from bert_glue.report.page import render, shortened
from bert_glue.report.words import shown_metrics
from bert_glue.results.model_card import last_part, short_name, task_title, windows_text
from bert_glue.results.records import Record, as_text, read_record
from bert_glue.storage.files import ANALYSIS_FILE, RECORD_FILE, RESULTS_FILE, STATE_FILE, read_json_object
from bert_glue.tasks import MULTI_LABEL, TASKS, GlueTask, own_task

_LONGEST_VALUE = 2000
_LONGEST_FACT = 300


def run_page(folder: Path) -> str:
    """report.html of one run, from the files in its folder.

    Raises:
        MachineError: there are no results, or a file has another content than its name says.
    """
    results = Record(read_json_object(folder / RESULTS_FILE), RESULTS_FILE)
    if not results.text("task_name"):
        raise MachineError(f"{folder / 'all_results.json'} does not have the results of a run (task_name is missing)")
    task = task_of(results)
    found = sections.scores(task, results, shown_metrics(task))
    # The folder may also have files of an earlier run, so only what this run did is shown.
    analysis = read_record(folder, ANALYSIS_FILE) if found else Record({})
    state = read_record(folder, STATE_FILE) if keys.TRAIN_STEPS in results else Record({})
    origin = read_record(folder, RECORD_FILE)
    splits = [sections.split_analysis(name, part) for name, part in analysis.part("splits").parts().items()]
    majority, constant = (found[0].majority, found[0].constant) if found else (None, "majority")
    values = {
        "title": title(task, results, origin),
        "results": results,
        "facts": _facts(results),
        "scores": found,
        "metric": results.text("headline_metric"),
        "comparison": sections.comparison(task, results, found),
        "curves": charts.curves(state.records("log_history"), results.text("headline_metric"), majority, constant),
        "splits": splits,
        "diagnostic": sections.diagnostic(analysis),
        "tables": _tables(results, origin),
    }
    ignored = [name for record in (results, analysis, state, origin) for name in record.ignored]
    return render("run.html", **values, ignored=ignored)


def task_of(results: Record) -> GlueTask:
    """The run's GLUE task, or a substitute for the user's own task."""
    name = results.text("task_name")
    return TASKS.get(name) or own_task(name, (), (), results.text("problem_type") == MULTI_LABEL)


def title(task: GlueTask, results: Record, origin: Record) -> str:
    """Task, model and date, but never a path."""
    started = origin.text("started")[:10]
    date = f", {started}" if re.fullmatch(r"\d{4}-\d\d-\d\d", started, re.ASCII) else ""
    return f"{task_title(task, origin.part('arguments'))}: {last_part(results.text('model_name_or_path', '?'))}{date}"


def _facts(results: Record) -> list[tuple[str, str]]:
    """(word, value) pairs: data, model, device and settings."""
    threshold = results.number("label_threshold")
    trained, ranks = results.text("trained"), results.number("world_size") or 1
    facts = [
        ("data", results.text("data")),
        ("model", short_name(results.text("model_name_or_path"))),
        ("device", results.text("device_name")),
        ("ranks", f"{ranks:g}" if ranks > 1 else ""),
        ("precision", results.text("precision")),
        ("batches", results.text("batches")),
        ("windows", windows_text(results)),
        ("seed", _count(results.number("seed"))),
        ("label_threshold", f"{threshold:g}" if threshold is not None else ""),
        ("trained", "" if trained == "all" else trained),
        ("class_weights", _weights(results.part(keys.CLASS_WEIGHTS))),
        ("calibrated", _calibration(results)),
        ("fallback", results.text("fallback")),
    ]
    return [(word, value) for word, value in facts if value]


def _weights(weights: Record) -> str:
    found = [(name, weights.number(name)) for name in weights.values]
    text = ", ".join(f"{name} {weight:.4g}" for name, weight in found if weight is not None)
    return shortened(text, _LONGEST_FACT)


def _calibration(results: Record) -> str:
    chosen, error = results.part(keys.CALIBRATION), keys.CALIBRATION_ERROR
    before, after = (results.number(key) for key in (keys.evaluation_key(error), keys.calibrated_key(error)))
    figures = [
        ("temperature", chosen.number("temperature")),
        (f"threshold of {chosen.text('threshold_of')}", chosen.number("threshold")),
        ("expected calibration error", before),
        ("with it", after),
    ]
    found = [f"{name} {value:.4g}" for name, value in figures if value is not None]
    return ", ".join(found) if keys.CALIBRATION in results else ""


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _tables(results: Record, origin: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, rows) of the tables of details."""
    seconds = results.part("seconds")
    given = {
        "everything": {name: value for name, value in results.values.items() if not isinstance(value, dict)},
        "seconds": {name: round(value, 2) for name in seconds.values if (value := seconds.number(name)) is not None},
        "origin": {name: value for name, value in origin.values.items() if name != "arguments"},
    }
    return [
        (word, [(name, shortened(as_text(value), _LONGEST_VALUE)) for name, value in rows.items()])
        for word, rows in given.items()
        if rows
    ]
