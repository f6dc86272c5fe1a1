"""All that one training run holds, and where it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bert_glue.arguments import Arguments
from bert_glue.average import WeightAverage
from bert_glue.batching import Assembler, TokenSplit, TrainingOrder
from bert_glue.model import LoadedModel
from bert_glue.precision_plan import TrainingPrecision
from bert_glue.profiling import NoTrace
from bert_glue.progress import Progress, ProgressLog
from bert_glue.ranks import Ranks
from bert_glue.saving import Saver
from bert_glue.tasks import GlueTask
from bert_glue.throughput import Meter, Phases
from bert_glue.vocabulary import NarrowedEmbedding

if TYPE_CHECKING:
    from bert_glue.graphs import RecordedStep


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
    ranks: Ranks
    model: LoadedModel
    precision: TrainingPrecision
    optimizer: torch.optim.Optimizer
    assemble: Assembler
    split: TokenSplit
    order: TrainingOrder
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
