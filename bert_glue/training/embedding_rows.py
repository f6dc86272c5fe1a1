"""Trains only the embedding rows that the data uses, with exactly the same result.

A row that no sample reads has a zero gradient and zero Adam moments, so that its update is the weight decay alone.
Leaving such rows out of gradient, moments and update saves work and changes nothing else. With MiniLM on CoLA,
5,600 of 30,522 rows are in use, and the optimizer touches half the memory.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import TokenSplit
from bert_glue.model.classifier import LoadedModel
from bert_glue.model.embedding import Embedding
from bert_glue.training.optim import is_elementwise


def narrow(args: Arguments, model: LoadedModel, splits: dict[str, TokenSplit]) -> NarrowedEmbedding | None:
    """Leave unused embedding rows out of training where the optimizer cannot tell the difference."""
    is_trained = args.do_train and model.is_packed and model.module.words.weight.requires_grad
    if not (is_trained and is_elementwise(args.optim)):
        return None
    return NarrowedEmbedding(model.module, list(splits.values()), model.module.shape.pad_token_id or 0)


class NarrowedEmbedding:
    """Replaces a module's word table by the rows in use, and can expand it again.

    Args:
        module: a module with an embedding `words`.
        splits: all data that this run reads, training data and other data.
        pad_id: token id of padding; its row stays, because filler tokens use it.

    Attributes:
        rate: factor of the learning rate of the rows in use.
        decay: factor by which weight decay has reduced the other rows so far.
    """

    def __init__(self, module: nn.Module, splits: list[TokenSplit], pad_id: int):
        table = module.words.weight.data
        used = np.zeros(len(table), bool)
        used[pad_id] = True
        for split in splits:
            used[split.table.ids] = True
        self.rows = torch.from_numpy(np.flatnonzero(used))
        self.row_of_token = (np.cumsum(used) - 1).astype(np.int32)
        self.full = table
        self.decay, self.rate = 1.0, 1.0
        module.words = Embedding.from_pretrained(table[self.rows], freeze=False)

    def count_decay(self, learning_rate: float, weight_decay: float) -> None:
        """Count one optimizer step's decoupled weight decay for the rows that are left out."""
        self.decay *= 1.0 - self.rate * learning_rate * weight_decay

    def expand(self, narrow: torch.Tensor) -> torch.Tensor:
        """The whole table with trained rows in place and the others decayed, `[used, width] -> [vocab, width]`."""
        full = self.full * self.decay
        full[self.rows] = narrow.detach().to(full.device, full.dtype)
        return full
