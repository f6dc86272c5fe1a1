"""What a run leaves behind: results as JSON, predictions, curves, a model card and a one-file report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_glue import result_keys as keys
from bert_glue.config.arguments import Arguments
from bert_glue.errors import Failures
from bert_glue.report import charts
from bert_glue.report.run_page import run_page
from bert_glue.results.earlier import merged
from bert_glue.results.model_card import model_card, without_folders
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
from bert_glue.tasks import GlueTask

if TYPE_CHECKING:
    from bert_glue.data.batching import TokenSplit
    from bert_glue.data.sources import TaskData
    from bert_glue.model.classifier import LoadedModel
    from bert_glue.training.console import ConsoleLog


def show_example(data: TaskData, split: TokenSplit, model: LoadedModel, log: ConsoleLog) -> None:
    """One training row as the model sees it: texts, tokens and label."""
    texts = [column[0] for column in data.splits[split.name].texts]
    ids = split.table.ids[split.table.offsets[0] : split.table.offsets[1]].tolist()
    tokens = " ".join(model.tokenizer.words(ids))
    label = split.labels[0] if data.task.is_regression else data.task.labels[split.labels[0]]
    log.line(f"example: {' | '.join(texts)}")
    log.line(f"  tokens: {tokens}")
    log.line(f"  label: {label}")


def write_predictions(folder: Path, task: GlueTask, suffix: str, predictions: np.ndarray) -> None:
    """`predict_results_<task>.txt`, header `index<TAB>prediction`, label names or scores to 3 decimals.

    The format has no quoting: a backslash, tab or line end in a label name is escaped, such as `\\n`.
    """
    low, high = task.score_range or (-np.inf, np.inf)
    if task.is_regression:
        values = [f"{min(max(float(p), low), high):.3f}" for p in predictions]
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
    """All files of a finished run, into `--output_dir`; what is drawn comes last, and may fail.

    A run that does not train adds to what the folder holds on the same model.

    Args:
        record: run.json.
        analysis: analysis.json.
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


_SUMMARY = frozenset((
    "device_name", "precision", "fallback", "batches", "epoch", "device_gemm_tflops_per_second", keys.TRAIN_LOSS,
    keys.TRAIN_SAMPLES_PER_SECOND, keys.reason_key(keys.TRAIN_SAMPLES_PER_SECOND), keys.TRAIN_REAL_TOKENS_PER_SECOND,
    keys.TRAIN_COMPUTED_TOKENS_PER_SECOND, keys.TRAIN_PADDING_PERCENT, keys.TRAIN_MODEL_TFLOPS_PER_SECOND,
    keys.TRAIN_SHARE_OF_GEMM, keys.reason_key(keys.TRAIN_SHARE_OF_GEMM), keys.E2E_RUNTIME,
))  # fmt: skip


def summary(results: dict) -> list[str]:
    """Last lines of a run's log."""
    lines = ["***** results *****" + (" (sample data, not GLUE)" if results["sample_data"] else "")]
    for name, value in results.items():
        if not isinstance(value, dict) and (keys.is_of_evaluation(name) or name in _SUMMARY):
            if isinstance(value, float):
                value = f"{value:.4f}"
            if value not in ("", None) or name == keys.TRAIN_SAMPLES_PER_SECOND:
                lines.append(f"  {name} = {value}")
    return lines


def curves(path: Path, history: list[dict], majority: float | None, data: TaskData) -> None:
    """The training charts of the report as a PNG.

    Args:
        majority: the headline metric of the most frequent class, 0..1; None where unknown.
    """
    drawn = charts.curves(Record({"history": history}).records("history"), data.task.headline, majority)
    with written_aside(path) as aside:
        charts.write_png(aside, drawn, f"{data.task.name}, {without_folders(data.source)}")
