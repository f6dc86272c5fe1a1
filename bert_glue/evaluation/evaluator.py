"""Exact evaluation and prediction: every sample once, over any number of ranks, in the data's order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from bert_glue import result_keys as keys
from bert_glue.data.batching import Collator, TokenSplit, evaluation_batches, prefetch
from bert_glue.devices.device import Device
from bert_glue.devices.distributed import DistributedContext
from bert_glue.errors import DivergedError
from bert_glue.evaluation.answers import predictions_of, row_losses
from bert_glue.evaluation.collapse import collapsed_predictions
from bert_glue.precision.native import InferencePrecision, NativePrecision
from bert_glue.tasks import GlueTask


class EvaluationStopped(Exception):
    """A signal has asked a rank to stop; all ranks raise this together."""


@dataclass(frozen=True)
class Evaluator:
    """Runs a module over splits.

    Args:
        module: classifier; put into evaluation mode while it runs.
        assemble: rows to batches.
        batch_size: sequences per rank and forward pass.
        stop_asked: whether this rank shall stop, asked before each batch.
    """

    module: torch.nn.Module
    collate: Collator
    batch_size: int
    ranks: DistributedContext
    precision: NativePrecision | InferencePrecision
    stop_requested: Callable[[], bool] = lambda: False

    @torch.no_grad()
    def logits(self, split: TokenSplit) -> np.ndarray:
        """Logits of all rows, `[rows, labels]` float32, on every rank: of a row in windows the mean over them.

        A batch holds windows, not rows, so that memory does not grow with the longest text.

        Raises:
            EvaluationStopped: some rank was asked to stop.
        """
        self.module.eval()
        ranks = self.ranks
        is_even = self.collate.depends_on_padding
        collate = replace(self.collate, padding="longest", is_rounded=False) if is_even else self.collate
        single = split.sequences
        rows = evaluation_batches(single.table.lengths, self.batch_size, ranks.rank, ranks.world_size, is_even)
        batches = (collate(single, members) for members in rows)
        outputs = []
        with self.precision.autocast():
            for batch in batches if ranks.device.is_host else prefetch(batches):
                if self.stop_requested():
                    break
                outputs.append(self.module(**batch.inputs).float())
        own = torch.cat(outputs).cpu().numpy() if outputs else None
        gathered = ranks.all_gather_object((np.concatenate(rows) if rows else None, own, self.stop_requested()))
        if any(stopped for *_, stopped in gathered):
            raise EvaluationStopped
        parts = [(members, values) for members, values, _ in gathered if members is not None]
        result = np.empty((len(single), parts[0][1].shape[1]), np.float32)
        for members, values in parts:
            result[members] = values
        return split.table.row_means(result)


def evaluate(
    evaluator: Evaluator, task: GlueTask, splits: dict[str, TokenSplit], kept: dict[str, np.ndarray] | None = None
) -> dict[str, float | str | None]:
    """`eval_*` results of every labelled split of a task, MNLI's two under distinct keys.

    Beside the metrics (0..1): `majority_baseline`, the headline metric of a constant prediction; `collapsed`,
    why the predictions carry nothing, or None.

    Args:
        kept: gets the logits of each split, `[rows, labels]`.

    Raises:
        DivergedError: logits are not finite.
        EvaluationStopped: a signal asked for it.
    """
    from bert_glue.evaluation.metrics import compute_metrics, majority_baseline

    results: dict[str, float | str | None] = {}
    for name, suffix, _ in task.evaluation:
        if name not in splits:
            continue
        split = splits[name]
        device: Device = evaluator.ranks.device
        device.synchronize()
        begin = time.perf_counter()
        logits = evaluator.logits(split)
        device.synchronize()
        seconds = time.perf_counter() - begin
        if not np.isfinite(logits).all():
            raise DivergedError(f"logits on {name} are not finite (NaN or Inf): the weights have diverged")
        if kept is not None:
            kept[name] = logits
        predictions = predictions_of(task, logits)
        scores = compute_metrics(task, predictions, split.labels)
        figures: dict[str, float | str | None] = {
            keys.LOSS: float(row_losses(task, logits, split.labels).mean()),
            **scores,
            keys.MAJORITY_BASELINE: majority_baseline(task, split.labels),
            keys.COLLAPSED: collapsed_predictions(task, predictions, split.labels),
            keys.SAMPLES: len(split),
            **split.table.row_counts,
            keys.RUNTIME: seconds,
            keys.SAMPLES_PER_SECOND: len(split) / seconds,
            keys.REAL_TOKENS_PER_SECOND: float(split.table.offsets[-1]) / seconds,
        }
        for figure, value in figures.items():
            key = keys.evaluation_key(figure, suffix)
            results[key] = value
            if figure in scores.reasons:
                results[keys.reason_key(key)] = scores.reasons[figure]
    return results
