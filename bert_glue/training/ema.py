"""`--ema_decay`: an exponential moving average of the weights, which is evaluated and saved in their place.

After update t the average moves towards the weights by 1 - min(decay, (1 + t) / (10 + t)), so that the initial weights
soon lose their influence (TensorFlow's ExponentialMovingAverage with num_updates). The average is stored in fp32 beside
the masters. Ranks do not exchange it, because their weights are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bert_glue.precision.plan import TrainingPrecision
from bert_glue.training.embedding_rows import NarrowedEmbedding


class WeightAverage:
    """The average of a run's masters.

    Args:
        precision: owner of the masters; the average starts as a copy of them.
        narrowed: the rows of the word table that are left out of training; their weight decay is averaged too.
        decay: in (0, 1).
    """

    def __init__(self, precision: TrainingPrecision, narrowed: NarrowedEmbedding | None, decay: float):
        self.precision = precision
        self.narrowed = narrowed
        self.decay = decay
        self.values = [torch.empty_like(master, dtype=torch.float32) for master in precision.masters]
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again with the current weights."""
        for value, master in zip(self.values, self.precision.masters, strict=True):
            value.copy_(master)
        self.row_decay = 1.0

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Add the weights after `updates` updates (>= 1) to the average."""
        share = 1.0 - min(self.decay, (1 + updates) / (10 + updates))
        for value, master in zip(self.values, self.precision.masters, strict=True):
            value.lerp_(master.float(), share)
        if self.narrowed is not None:
            self.row_decay += share * (self.narrowed.decay - self.row_decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the average; afterwards it has its weights again, bit for bit."""
        kept = [master.detach().clone() for master in self.precision.masters]
        row_decay = self.narrowed.decay if self.narrowed is not None else 1.0
        self._put(self.values, self.row_decay)
        try:
            yield
        finally:
            self._put(kept, row_decay)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The average for a checkpoint, named `average.<number of master>`, on the host."""
        return {f"average.{number}": value.cpu().clone() for number, value in enumerate(self.values)}

    def load(self, tensors: dict[str, torch.Tensor], row_decay: float) -> None:
        """Restore what `tensors` returned; other tensors are ignored."""
        for number, value in enumerate(self.values):
            value.copy_(tensors[f"average.{number}"])
        self.row_decay = row_decay

    def _put(self, masters: list[torch.Tensor], row_decay: float) -> None:
        self.precision.load_masters(masters)
        if self.narrowed is not None:
            self.narrowed.decay = row_decay
