"""All that one training run holds, and where it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import Collator, TokenSplit, TrainingSampler
from bert_glue.devices.distributed import DistributedContext
from bert_glue.model.classifier import LoadedModel
from bert_glue.precision.plan import TrainingPrecision
from bert_glue.storage.checkpoint import Saver
from bert_glue.tasks import GlueTask
from bert_glue.training.console import ProgressLog
from bert_glue.training.ema import WeightAverage
from bert_glue.training.embedding_rows import NarrowedEmbedding
from bert_glue.training.profiler import NoTrace
from bert_glue.training.throughput import Meter, Phases

if TYPE_CHECKING:
    from bert_glue.training.cuda_graphs import RecordedStep


@dataclass
class Progress:
    """Where a run is; all of it goes into a checkpoint.

    Args:
        step: optimizer steps done, skipped ones included.
        updates: optimizer steps that changed weights: the schedule's clock.
        forward_passes: micro-batches done, the address of dropout masks.
        samples: consumed by all ranks.
        loss_sum: sum of the losses of all steps up to the last log line.
        recent_loss, recent_steps: the same of the steps since then, as of the checkpoint.
        history: log lines: step, epoch, loss, learning_rate, grad_norm, loss_scale or eval_*.
        evaluated_step: of the last evaluation that ran to its end.
        changes: settings that were changed by a resume, a line each.
    """

    step: int = 0
    updates: int = 0
    forward_passes: int = 0
    samples: int = 0
    loss_sum: float = 0.0
    recent_loss: float = 0.0
    recent_steps: int = 0
    best_metric: float | None = None
    best_step: int = 0
    evaluations_without_gain: int = 0
    history: list[dict] = field(default_factory=list)
    evaluated_step: int = 0
    changes: list[str] = field(default_factory=list)


@dataclass
class Run:
    """All parts of one training run, built by recipe.py.

    Args:
        total_steps: optimizer steps of the whole run.
        evaluate: gives `eval_*` results of the current weights.
        best_key: entry of those results that chooses the best checkpoint.
        phase: keeps the seconds of evaluation and saving apart from those of training.
        seconds: of training, with evaluation and saving.
        optimizer_used: name of the optimizer that runs, for results.
        trace: of the steps of --profile_steps.
        saved_step: of the last checkpoint that was begun or resumed from.
        recorded: steps of `--cuda_graph`.
        average: of the weights, where `--ema_decay` asks for one.
    """

    args: Arguments
    task: GlueTask
    ranks: DistributedContext
    model: LoadedModel
    precision: TrainingPrecision
    optimizer: torch.optim.Optimizer
    collate: Collator
    split: TokenSplit
    order: TrainingSampler
    total_steps: int
    meter: Meter
    log: ProgressLog
    evaluate: Callable[[], dict]
    best_key: str
    narrowed: NarrowedEmbedding | None = None
    optimizer_used: str = ""
    phase: Phases = field(default_factory=Phases)
    progress: Progress = field(default_factory=Progress)
    saver: Saver = field(default_factory=Saver)
    seconds: float = 0.0
    saved_step: int = 0
    trace: NoTrace = field(default_factory=NoTrace)
    average: WeightAverage | None = None
    recorded: RecordedStep | None = None

    def averaged(self) -> AbstractContextManager:
        """Meanwhile the model has the weights to evaluate and save: the average, if there is one."""
        return self.average.in_place() if self.average else nullcontext()

    @property
    def output_dir(self) -> Path:
        """Folder of this run's results."""
        return Path(self.args.output_dir)

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction."""
        return self.progress.step / self.order.steps_per_epoch
