"""Writes the outputs of a run: results as JSON, predictions, curves, a model card and a report in one file."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_glue import result_keys as keys
from bert_glue.config.arguments import Arguments
from bert_glue.data.own.label_sets import DELIMITER, one_line_of
from bert_glue.errors import Failures
from bert_glue.evaluation.answers import answer_text, label_lists
from bert_glue.evaluation.collapse import collapse_reason
from bert_glue.report import charts
from bert_glue.report.page import duration, points, rate
from bert_glue.report.run_page import run_page, task_of
from bert_glue.report.sections import Score, scores
from bert_glue.report.words import NAMED_METRICS, WORDS, shown_metrics
from bert_glue.results.earlier import merged
from bert_glue.results.model_card import last_part, model_card, without_folders
from bert_glue.results.records import Record
from bert_glue.storage.files import (
    ANALYSIS_FILE,
    RECORD_FILE,
    RESULTS_FILE,
    STATE_FILE,
    one_line,
    write_json,
    write_whole,
    written_aside,
)
from bert_glue.tasks import SAMPLE_NOTE, GlueTask

if TYPE_CHECKING:
    from bert_glue.data.batching import TokenSplit
    from bert_glue.data.sources import TaskData
    from bert_glue.model.classifier import LoadedModel
    from bert_glue.training.console import ConsoleLog


def show_example(data: TaskData, split: TokenSplit, model: LoadedModel, log: ConsoleLog) -> None:
    """Logs one training row as the model reads it: texts, tokens and label."""
    texts = [column[0] for column in data.splits[split.name].texts]
    ids = split.table.ids_of(0).tolist()
    tokens = " ".join(model.tokenizer.words(ids))
    label = split.labels[0] if data.task.is_regression else answer_text(data.task, split.labels[0])
    log.line(f"example: {' | '.join(texts)}")
    log.line(f"  tokens: {tokens}")
    log.line(f"  label: {label}")


def write_predictions(folder: Path, task: GlueTask, suffix: str, predictions: np.ndarray) -> None:
    """Writes `predict_results_<task>.txt` with label names or scores. The header is `index<TAB>prediction`.

    GLUE scores have 3 decimals, as the leaderboard requires; scores of own data keep all digits. The format has no
    quoting, so a backslash, tab or line end in a label name is escaped, such as `\\n`. Several labels of a row are
    separated by their delimiter, which is escaped within a name.
    """
    if task.is_regression and task.score_range is not None:
        low, high = task.score_range
        values = [f"{min(max(float(p), low), high):.3f}" for p in predictions]
    elif task.is_regression:
        values = [str(np.float32(p)) for p in predictions]
    elif task.is_multi_label:
        delimiter = task.label_delimiter or DELIMITER
        values = [one_line_of(names, delimiter) for names in label_lists(task, predictions)]
    else:
        names = [one_line(label) for label in task.labels]
        values = [names[p] for p in predictions]
    lines = ["index\tprediction", *(f"{i}\t{value}" for i, value in enumerate(values))]
    write_whole(folder / keys.predictions_file(task.name, suffix), "\n".join(lines) + "\n")


def write_results(
    args: Arguments,
    data: TaskData,
    results: dict,
    history: list[dict],
    *,
    record: dict,
    analysis: dict,
    failures: Failures,
) -> None:
    """Writes all files of a finished run into `--output_dir`. Charts, card and report come last and may fail.

    A run without training merges its results into those of the same model in the folder.

    Args:
        record: the content of run.json.
        analysis: the content of analysis.json.
    """
    folder = Path(args.output_dir)
    whole, whole_record = results, record
    if not args.do_train:
        whole, whole_record, analysis = merged(folder, results, record, analysis)
    if analysis:
        write_json(folder / ANALYSIS_FILE, analysis)
    write_json(folder / RESULTS_FILE, whole)
    for phase in ("train", "eval", "predict"):
        own = {k: v for k, v in results.items() if k.startswith(phase) or k in ("epoch", "task_name", "sample_data")}
        if getattr(args, f"do_{phase}"):
            write_json(folder / f"{phase}_results.json", own)
    write_json(folder / RECORD_FILE, whole_record)
    if args.do_train:
        write_json(folder / STATE_FILE, {"log_history": history, "global_step": results[keys.TRAIN_STEPS]})
        rows = [f"{e['step']}\t{e['loss']}\t{e['learning_rate']}" for e in history if "loss" in e]
        write_whole(folder / "train_loss.tsv", "\n".join(["step\tloss\tlearning_rate", *rows]) + "\n")
        with failures.step("drawing curves.png"):
            majority = results.get(keys.evaluation_key(keys.MAJORITY_BASELINE))
            curves(folder / "curves.png", history, majority, data)
        with failures.step("the model card"):
            write_whole(folder / "README.md", model_card(data, results, record))
    with failures.step("the report"):
        write_whole(folder / "report.html", run_page(folder))


def summary(results: dict, folder: Path) -> list[str]:
    """The last log lines of a run: score, training, speed, time, and the next command.

    Args:
        folder: `--output_dir`.
    """
    record = Record(results)
    task = task_of(record)
    found = scores(task, record, shown_metrics(task))
    rows = [("score", _score_text(record.text("headline_metric"), score)) for score in found]
    if reason := collapse_reason(results):
        rows.append(("warning", f"the model learned nothing: {reason}"))
    if keys.TRAIN_STEPS in record:
        rows.append(("trained", _training_text(record)))
    if keys.TRAIN_SAMPLES_PER_SECOND in record:
        reason = record.text(keys.reason_key(keys.TRAIN_SAMPLES_PER_SECOND))
        speed = record.number(keys.TRAIN_SAMPLES_PER_SECOND)
        rows.append(("speed", f"{rate(speed)} samples/s" + (f" ({reason})" if reason else "")))
    training = f", training {duration(record.number(keys.TRAIN_RUNTIME))}" if keys.TRAIN_RUNTIME in record else ""
    rows.append(("time", f"{duration(record.number(keys.E2E_RUNTIME))}{training}"))
    rows.append(("report", str(folder / "report.html")))
    if keys.STOPPED_BY_SIGNAL in record:  # the folder may have no model, so nothing can be predicted with it
        more = " with --resume_from_checkpoint auto continues" if keys.TRAIN_STEPS in record else " starts it again"
        rows += [("stopped", "by a signal, before the run was complete"), ("next", f"the same command{more}")]
    elif keys.TRAIN_STEPS in record:
        call = [_python(), "-m", "bert_glue.predict", "--model", str(folder), "--input", "FILE", "--output", "FILE"]
        rows.append(("next", shlex.join(call)))
    note = f" ({SAMPLE_NOTE})" if results["sample_data"] else ""
    lines = [f"***** results *****{note}", *(f"  {name:<9}{text}" for name, text in rows)]
    return [*lines, *_lines_for_harnesses(task, record)]


def _python() -> str:
    """How a user starts this python: by its name if the PATH leads to it, as in an activated environment."""
    found = shutil.which("python")
    # The folders are compared, because both files of a virtual environment are links to the python it was made from.
    return "python" if found and Path(found).parent.samefile(Path(sys.executable).parent) else sys.executable


def _lines_for_harnesses(task: GlueTask, record: Record) -> list[str]:
    """The figures that ModelZoo scripts read from a log: grep "eval_f1" train_*.log | awk 'END{print $3}'.

    So no later line may contain the key of a metric, and eval_accuracy_mm comes before eval_accuracy. A line must not
    begin with a blank, because grep writes the file name before it if it reads several files.
    """
    found = [
        keys.evaluation_key(metric, split.key_suffix)
        for split in reversed(task.evaluation)
        for metric in shown_metrics(task)
    ]
    found.append(keys.TRAIN_SAMPLES_PER_SECOND)
    # A metric of this evaluation that is undefined is shown too, because grep would find an earlier one.
    return [f"{key} = {_four_digits(record.number(key))}" for key in found if key in record]


def _four_digits(number: float | None) -> str:
    return "null" if number is None else f"{number:.4f}"


_CONSTANT = {"majority": "always the most frequent class", "constant": "always the same labels, at best"}


def _score_text(metric: str, score: Score) -> str:
    named = WORDS[metric][0] if metric in NAMED_METRICS else metric
    text = f"{named} {points(score.value)} on {score.rows or 0:,.0f} rows of {score.split}"
    if score.standard_error is not None:
        text += f", standard error {points(score.standard_error)}"
    if score.majority is not None:
        text += f"; {_CONSTANT[score.constant]}: {points(score.majority)}"
    return text + (f" ({score.reason})" if score.reason else "")


def _training_text(results: Record) -> str:
    steps, samples = results.number(keys.TRAIN_STEPS), results.number(keys.TRAIN_SAMPLES) or 0
    text = f"{last_part(results.text('model_name_or_path'))} on {results.text('task_name')}, {samples:,.0f} rows, "
    text += f"{results.number('epoch') or 0:.3g} epochs ({steps:,.0f} steps), {results.text('precision')}"
    return ", ".join(filter(None, [text, results.text("fallback"), results.text("device_name")]))


def figures(results: dict) -> list[str]:
    """Log lines with every figure of the results, for `--log_level debug`."""
    return [f"  {name} = {value}" for name, value in results.items() if not isinstance(value, dict)]


def curves(path: Path, history: list[dict], majority: float | None, data: TaskData) -> None:
    """Draws the training charts of the report as a PNG.

    Args:
        majority: the headline metric of the best constant prediction, 0..1. None if unknown.
    """
    constant = "constant" if data.task.is_multi_label else "majority"
    drawn = charts.curves(Record({"history": history}).records("history"), data.task.headline, majority, constant)
    with written_aside(path) as aside:
        charts.write_png(aside, drawn, f"{data.task.name}, {without_folders(data.source)}")
