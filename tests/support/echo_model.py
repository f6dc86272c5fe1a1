"""A model whose logits are encoded in its rows, and splits of such rows."""

from __future__ import annotations

import numpy as np
import torch

from bert_glue.data.batching import Collator, TokenSplit
from bert_glue.data.tokenization import TokenTable
from bert_glue.devices.distributed import DistributedContext
from bert_glue.evaluation.evaluator import Evaluator
from bert_glue.precision.native import NativePrecision
from bert_glue.precision.plan import PrecisionPlan


class Echo(torch.nn.Module):
    """Logits that identify the row: the id of its first token, and its length."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids, token_type_ids, position_ids, layout, noise=None):
        first = input_ids[0, list(layout.cu_seq_lens[: len(layout.lengths)])].float()
        return torch.stack([first, torch.tensor(layout.lengths).float()], 1) * self.weight


def split_of(size: int) -> TokenSplit:
    """Row `i` begins with token `i`; lengths vary."""
    lengths = np.random.default_rng(size).integers(1, 12, size)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.zeros(offsets[-1], np.int32)
    ids[offsets[:-1]] = np.arange(size)
    return TokenSplit("validation", TokenTable(ids, offsets, np.zeros(len(ids), np.int8)), np.arange(size) % 2)


def echo_evaluator(batch_size: int = 8) -> Evaluator:
    module = Echo()
    collate = Collator("packed", 16, 0, True, torch.device("cpu"))
    precision = NativePrecision(PrecisionPlan("O0", torch.float32, 1.0), module)
    return Evaluator(module, collate, batch_size, DistributedContext(arguments_of_cpu()), precision)


def arguments_of_cpu():
    from bert_glue.config.arguments import Arguments

    return Arguments(use_cpu=True)
