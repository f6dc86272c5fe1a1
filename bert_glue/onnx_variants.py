"""fp16 and int8 variants of an exported graph, and what each graph gives on real rows: differences, score and latency.

The rows are the run's own validation rows, found through its run.json. Labels are held against the answers, so the
score of a variant stands beside torch's. onnxruntime makes the variants: `transformers.float16` and `quantize_dynamic`.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bert_glue.config.arguments import FLAGS, Arguments
from bert_glue.errors import DataError, UserError
from bert_glue.model.folder import task_of_model
from bert_glue.storage.files import RECORD_FILE
from bert_glue.tasks import GlueTask

if TYPE_CHECKING:
    from bert_glue.data.batching import Batch, TokenSplit
    from bert_glue.model.classifier import LoadedModel

FP16, INT8 = "fp16", "int8"
_BATCH = 8  # rows of a batch, for the check and for the throughput
_ALONE = 32  # rows that are timed one by one

Runner = Callable[[dict[str, np.ndarray]], np.ndarray]  # inputs [batch, seq_len] -> logits [batch, labels]


class Figures(NamedTuple):
    """What one graph gives.

    Args:
        difference: largest difference of a logit from torch's.
        same: share of the rows with torch's answer, 0..1; of a score, within 0.01 of it.
        score: the headline metric on these rows; None where it is not defined.
        alone: median milliseconds of a row alone.
        rate: rows per second in batches.
    """

    name: str
    size: int
    difference: float
    same: float
    score: float | None
    alone: float
    rate: float


def variant_path(path: Path, kind: str) -> Path:
    """model.onnx -> model.fp16.onnx"""
    return path.with_suffix(f".{kind}.onnx")


def write_variant(path: Path, target: Path, kind: str) -> None:
    """Write the fp16 or the int8 variant of a graph. Inputs and logits keep their types.

    Args:
        kind: `FP16`: weights and products in fp16; `INT8`: weights of products in 7 bits and activations in 8, whose
            range is taken from each batch. Seven bits do not overflow on CPUs without VNNI.
    """
    import onnx

    if kind == FP16:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(str(path)), keep_io_types=True), str(target))
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    properties = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    logging.disable(logging.WARNING)  # advice to pre-process pictures' networks
    try:
        quantize_dynamic(path, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    finally:
        logging.disable(logging.NOTSET)
    graph = onnx.load(str(target))
    onnx.helper.set_model_props(graph, properties)
    onnx.save(graph, str(target))


def own_rows(run: Path, model: LoadedModel, most: int) -> tuple[GlueTask, TokenSplit]:
    """The first validation rows of the run that made a model, as it read them.

    Args:
        most: rows.

    Raises:
        UserError: the run's run.json or its data is not here any more, or has no labelled rows.
    """
    from bert_glue.config.repeat import read_run, settings_of
    from bert_glue.data.sources import load_task_data
    from bert_glue.pipeline.inputs import tokenize_splits
    from bert_glue.training.console import ConsoleLog

    settings = settings_of(read_run(str(run / RECORD_FILE)))
    args = Arguments(**{name: value for name, value in settings.items() if name in FLAGS})
    args = replace(args, max_eval_samples=min(most, args.max_eval_samples or most), doc_stride=None)
    data = load_task_data(args, frozenset({"evaluation"}))
    name = data.task.evaluation[0][0]
    if name not in data.splits or data.splits[name].labels is None:
        raise DataError(f"{run}: its run has no labelled validation rows")
    data = replace(data, splits={name: data.splits[name]})
    split = tokenize_splits(args, data, model, ConsoleLog(False, False))[name]
    return task_of_model(run)[0], split


def compare(
    model: LoadedModel, names: list[str], graphs: dict[str, Path], task: GlueTask, split: TokenSplit
) -> list[Figures]:
    """Figures of torch's module and of each graph, on the same rows and the same number of threads.

    Args:
        names: inputs of the graphs.
        graphs: name -> file.
    """
    import torch

    def with_torch(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return model.module(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()

    runners: dict[str, tuple[int, Runner]] = {
        "torch": (sum(p.numel() * p.element_size() for p in model.module.parameters()), with_torch)
    }
    for name, path in graphs.items():
        runners[name] = (path.stat().st_size, _session(path, torch.get_num_threads()))
    batches = [_inputs(batch, names) for batch in _batches(model, split, _BATCH)]
    singles = [_inputs(batch, names) for batch in _batches(model, split, 1, _ALONE)]
    found: list[Figures] = []
    expected: np.ndarray | None = None
    for name, (size, run) in runners.items():
        logits = np.concatenate([run(inputs) for inputs in batches])  # this also warms the runner up
        expected = logits if expected is None else expected
        difference, same, score = _agreement(task, logits, expected, split.labels)
        begin = time.perf_counter()
        for inputs in batches:
            run(inputs)
        rate = len(split) / (time.perf_counter() - begin)
        found.append(Figures(name, size, difference, same, score, _milliseconds(run, singles), rate))
    return found


def _session(path: Path, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings are about constants that it folds
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["logits"], inputs)[0]


def _batches(model: LoadedModel, split: TokenSplit, size: int, most: int | None = None) -> list[Batch]:
    from bert_glue.data.batching import Collator

    collate = Collator(
        padding="longest",
        max_length=model.position_limit,
        pad_id=model.pad_id,
        device=next(model.module.parameters()).device,
        gives_types=model.tokenizer.gives_types,
        pads_left=model.tokenizer.pads_left,
    )
    rows = np.arange(len(split) if most is None else min(most, len(split)))
    return [collate(split, rows[begin : begin + size]) for begin in range(0, len(rows), size)]


def _inputs(batch: Batch, names: list[str]) -> dict[str, np.ndarray]:
    return {name: batch.inputs[name].numpy() for name in names}


def _agreement(
    task: GlueTask, logits: np.ndarray, expected: np.ndarray, labels: np.ndarray
) -> tuple[float, float, float | None]:
    """(largest difference, share of equal answers, headline metric)."""
    from bert_glue.evaluation.answers import predictions_of
    from bert_glue.evaluation.metrics import compute_metrics

    answers, others = predictions_of(task, logits), predictions_of(task, expected)
    is_equal = np.abs(answers - others) < 0.01 if task.is_regression else answers == others
    same = float(is_equal.all(axis=tuple(range(1, is_equal.ndim))).mean())
    score = compute_metrics(task, answers, labels)[task.headline]
    return float(np.abs(logits - expected).max()), same, score


def _milliseconds(run: Runner, singles: list[dict[str, np.ndarray]]) -> float:
    times = []
    for inputs in singles:
        begin = time.perf_counter()
        run(inputs)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def table(found: list[Figures], task: GlueTask, rows: int, threads: int) -> list[str]:
    """The figures as aligned lines for a terminal."""
    heads = ("", "MB", "difference", "same answers", task.headline, "ms a row", "rows/s")
    cells = [
        (
            one.name, f"{one.size / 1e6:.1f}", f"{one.difference:.1e}", f"{100 * one.same:.1f} %",
            "-" if one.score is None else f"{one.score:.4f}", f"{one.alone:.2f}", f"{one.rate:.1f}",
        )
        for one in found
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if at == 0 else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (heads, *cells)
    ]
    about = f"on {rows} validation rows of the run, CPU, {threads} {'thread' if threads == 1 else 'threads'}"
    return [
        f"{about}; difference: of a logit from torch's; rows/s in batches of {_BATCH}:",
        *(f"  {line}".rstrip() for line in lines),
    ]


def why_no_rows(error: UserError) -> str:
    """The line where the run's rows cannot be had."""
    reason = str(error).splitlines()[0]
    return f"note: score and latency are not measured, because the rows of the run are not here: {reason}"
