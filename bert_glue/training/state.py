"""The state of one training run, grouped by who may change it.

Nothing here is replaced while a run trains. Each group is frozen, and every change happens inside the object that owns
it. The loop (`loop.py`) advances `progress` and steps the learner. `resume.py` alone restores both and maintains
`checkpoints`. Observers change nothing.
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
    """The progress of a run, which the loop advances. Its fields are keys of every checkpoint's trainer_state.json.

    Args:
        step: optimizer steps so far, skipped ones included.
        updates: optimizer steps that changed weights; the learning-rate schedule counts these.
        forward_passes: micro-batches so far; the dropout masks depend on this number.
        samples: samples consumed by all ranks.
        loss_sum: sum of the losses of all steps up to the last log line.
        recent_loss, recent_steps: sum and number of the losses since then, at the time of the checkpoint.
        history: log lines: step, epoch, loss, learning_rate, grad_norm, loss_scale or eval_*.
        evaluated_step: step of the last complete evaluation.
        changes: settings that a resume changed, one line each.
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
        """Restore every field from a checkpoint's trainer_state.json, which also holds other keys."""
        for item in fields(self):
            setattr(self, item.name, stored[item.name])


class OptimizerStep(Protocol):
    """The parts of an optimizer step that run on the device, eager (`loop.py`) or replayed (`cuda_graphs.py`)."""

    def run_pass(self, batch: Batch, samples: int, is_last: bool = True) -> torch.Tensor:
        """Run a batch forward and backward, in a step of `samples` on all ranks; return the loss to log, 0-d."""

    def gather_gradients(self) -> torch.Tensor:
        """The L2 norm of the gradients, 0-d; called after the all_reduce."""

    def finish(self, norm: torch.Tensor) -> bool:
        """Clip and update; return False where an overflow skips the step."""

    def summary(self) -> str | None:
        """A line for the log on how the steps ran; None if there is nothing to report."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The weights in training and everything that a step changes. Only steps and a resume change it, in place.

    Args:
        optimizer_name: name of the optimizer that runs, with the reason if it is not the requested one.
        objective: the training objective.
        narrowed: the word table cut to the rows in use, where this is exact.
        average: moving average of the weights; None without `--ema_decay`.
    """

    model: LoadedModel
    precision: TrainingPrecision
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    objective: Objective
    narrowed: NarrowedEmbedding | None = None
    average: WeightAverage | None = None

    def averaged(self) -> AbstractContextManager:
        """A context in which the model has the weights to evaluate and save: the average, if there is one."""
        return self.average.in_place() if self.average else nullcontext()


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """The training data of a run; nothing changes it.

    Args:
        sampler: chooses the rows of each step.
        collate: makes a batch of rows on this rank's device.
        total_steps: optimizer steps of the whole run.
        class_weights: `[labels]`; None without `--class_weights`.
    """

    split: TokenSplit
    sampler: TrainingSampler
    collate: Collator
    total_steps: int
    class_weights: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The evaluation of a run while it trains.

    Args:
        evaluate: returns the `eval_*` results of the current weights.
        best_key: the entry of those results that chooses the best checkpoint.
    """

    evaluate: Callable[[], dict]
    best_key: str


@dataclass(frozen=True, kw_only=True)
class Observers:
    """The observers of a run in training; no weight depends on them.

    Args:
        meter: counts and times the steps.
        phases: separates the seconds of evaluation and saving from those of training.
    """

    log: ConsoleLog
    trackers: Trackers
    watch: CollapseWatch
    meter: Meter
    phases: Phases = field(default_factory=Phases)

    def record(self, entry: dict, history: list[dict]) -> None:
        """Pass a log entry, the last one of `history`, to the trackers, the console and the collapse watch."""
        self.trackers.log(entry, entry["step"])
        for problem in self.trackers.problems():
            self.log.line(f"note: {problem}")
        self.log.entry(entry)
        for warning in self.watch.warnings(history):
            self.log.line(warning)


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of this run; `resume.py` alone changes this object.

    Args:
        saver: the thread that writes them.
        saved_step: step of the last checkpoint that the run has begun to write or resumed from.
    """

    saver: Saver = field(default_factory=Saver)
    saved_step: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """One training run, built by `setup.py`.

    Args:
        step: the parts of an optimizer step that run on the device.
        signals: signals that ask this rank to stop.
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
        """The folder of this run's results."""
        return Path(self.args.output_dir)

    @property
    def epoch(self) -> float:
        """Epochs so far, with a fraction."""
        return self.progress.step / self.data.sampler.steps_per_epoch
