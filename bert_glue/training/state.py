"""All that one training run holds, grouped by who may change it, and where it is.

Nothing here is replaced while a run trains: each group is frozen, and what changes does so inside of the object
that owns it. The loop (`loop.py`) advances `progress` and steps the learner; `resume.py` alone restores both
and keeps `checkpoints`; observers look on and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import Batch, Collator, TokenSplit, TrainingSampler
from bert_glue.devices.distributed import DistributedContext
from bert_glue.evaluation.collapse import CollapseWatch
from bert_glue.model.classifier import LoadedModel
from bert_glue.precision.plan import TrainingPrecision
from bert_glue.storage.checkpoint import Saver
from bert_glue.tasks import GlueTask
from bert_glue.training.console import ConsoleLog, StopSignals
from bert_glue.training.ema import WeightAverage
from bert_glue.training.embedding_rows import NarrowedEmbedding
from bert_glue.training.losses import Objective
from bert_glue.training.throughput import Meter, Phases

if TYPE_CHECKING:
    from bert_glue.training.console import Trackers


@dataclass(kw_only=True)
class TrainProgress:
    """Where a run is; the loop advances it. Its fields are keys of every checkpoint's trainer_state.json.

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

    def restore(self, stored: dict[str, Any]) -> None:
        """Take every field from a checkpoint's trainer_state.json, which holds other keys too."""
        for item in fields(self):
            setattr(self, item.name, stored[item.name])


class OptimizerStep(Protocol):
    """The parts of a step that run on the device: eager (`loop.py`) or replayed (`cuda_graphs.py`)."""

    def run_pass(self, batch: Batch, samples: int, is_last: bool = True) -> torch.Tensor:
        """A batch forward and backward, in a step of `samples` samples on all ranks; returns the loss to show, 0-d."""

    def gather_gradients(self) -> torch.Tensor:
        """After the sum over ranks: the gradients' norm, 0-d."""

    def finish(self, norm: torch.Tensor) -> bool:
        """Clip and update; False where the step was skipped for overflow."""

    def summary(self) -> str | None:
        """How the steps ran, a line for the log; None if there is nothing to tell."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The weights in training, and all that a step changes with them. Only steps and a resume do, in place.

    Args:
        optimizer_name: of the optimizer that runs, with the reason if it is not the requested one.
        objective: what is minimised.
        narrowed: the word table cut to the rows in use, where that is exact.
        average: of the weights, where `--ema_decay` asks for one.
    """

    model: LoadedModel
    precision: TrainingPrecision
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    objective: Objective
    narrowed: NarrowedEmbedding | None = None
    average: WeightAverage | None = None

    def averaged(self) -> AbstractContextManager:
        """Meanwhile the model has the weights to evaluate and save: the average, if there is one."""
        return self.average.in_place() if self.average else nullcontext()


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """What a run trains on; nobody changes it.

    Args:
        sampler: which rows each step takes.
        collate: rows -> a batch on this rank's device.
        total_steps: optimizer steps of the whole run.
        class_weights: `[labels]`, where `--class_weights` gives some.
    """

    split: TokenSplit
    sampler: TrainingSampler
    collate: Collator
    total_steps: int
    class_weights: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How a run is evaluated while it trains.

    Args:
        evaluate: gives `eval_*` results of the current weights.
        best_key: entry of those results that chooses the best checkpoint.
    """

    evaluate: Callable[[], dict]
    best_key: str


@dataclass(frozen=True, kw_only=True)
class Observers:
    """What looks on while a run trains; nothing that is trained depends on them.

    Args:
        meter: counts and times the steps.
        phases: keep the seconds of evaluation and saving apart from those of training.
    """

    log: ConsoleLog
    trackers: Trackers
    watch: CollapseWatch
    meter: Meter
    phases: Phases = field(default_factory=Phases)

    def record(self, entry: dict, history: list[dict]) -> None:
        """Show a log entry, the last one of `history`: to the trackers, on the console, and to the collapse watch."""
        self.trackers.log(entry, entry["step"])
        for problem in self.trackers.problems():
            self.log.line(f"note: {problem}")
        self.log.entry(entry)
        for warning in self.watch.warnings(history):
            self.log.line(warning)


@dataclass(kw_only=True)
class Checkpoints:
    """Checkpoints of this run; `resume.py` alone changes this.

    Args:
        saver: the thread that writes them.
        saved_step: of the last one that was begun or resumed from.
    """

    saver: Saver = field(default_factory=Saver)
    saved_step: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """One training run, built by `setup.py`.

    Args:
        step: the device's part of an optimizer step.
        signals: whether this rank was asked to stop.
    """

    args: Arguments
    task: GlueTask
    ranks: DistributedContext
    data: TrainData
    learner: Learner
    step: OptimizerStep
    validation: Validation
    observers: Observers
    signals: StopSignals
    progress: TrainProgress = field(default_factory=TrainProgress)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    @property
    def output_dir(self) -> Path:
        """Folder of this run's results."""
        return Path(self.args.output_dir)

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction."""
        return self.progress.step / self.data.sampler.steps_per_epoch
