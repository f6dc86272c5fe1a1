"""A narrowed embedding table trains as the whole one would."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bert_glue.data.batching import TokenSplit
from bert_glue.data.tokenization import TokenTable
from bert_glue.training.embedding_rows import NarrowedEmbedding


class _Words(nn.Module):
    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(table.clone(), freeze=False)


def _splits(*ids) -> list[TokenSplit]:
    return [
        TokenSplit("x", TokenTable(np.array(i, np.int32), np.array([0]), np.zeros(len(i), np.int8)), None) for i in ids
    ]


def test_keeps_the_rows_of_all_splits_and_padding():
    table = torch.randn(10, 4)
    module = _Words(table)
    narrowed = NarrowedEmbedding(module, _splits([7, 2, 7], [9, 2]), pad_id=1)
    assert narrowed.rows.tolist() == [1, 2, 7, 9]
    assert torch.equal(module.words.weight, table[[1, 2, 7, 9]]) and module.words.weight.requires_grad
    ids = np.array([9, 7, 2, 1])
    assert torch.equal(module.words(torch.from_numpy(narrowed.row_of_token[ids].astype(np.int64))), table[ids])
    assert torch.equal(narrowed.expand(module.words.weight), table)


def test_training_equals_the_whole_table_with_decay():
    table = torch.randn(10, 4)
    whole, narrow = _Words(table), _Words(table)
    narrowed = NarrowedEmbedding(narrow, _splits([7, 2, 9]), pad_id=0)
    options = {"lr": 0.1, "weight_decay": 0.2}
    optimizers = [torch.optim.AdamW(m.parameters(), **options) for m in (whole, narrow)]
    for step in range(5):
        for group in (group for o in optimizers for group in o.param_groups):
            group["lr"] = 0.1 / (step + 1)
        ids = torch.tensor([[7, 2], [9, 7], [2, 2], [7, 9], [9, 2]][step])
        for module, optimizer, these in (
            (whole, optimizers[0], ids),
            (narrow, optimizers[1], torch.from_numpy(narrowed.row_of_token.astype(np.int64))[ids]),
        ):
            optimizer.zero_grad()
            module.words(these).pow(2).sum().backward()
            optimizer.step()
        narrowed.count_decay(0.1 / (step + 1), 0.2)
    wide = narrowed.expand(narrow.words.weight)
    torch.testing.assert_close(wide, whole.words.weight.detach())
    assert not torch.allclose(wide[3], table[3])
