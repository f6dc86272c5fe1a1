"""Small token tables and a collator over them."""

from __future__ import annotations

import numpy as np
import torch

from bert_glue.data.batching import Collator, TokenSplit
from bert_glue.data.tokenization import TokenTable

HOST = torch.device("cpu")


def _split(rows, second_at=None, labels=None) -> TokenSplit:
    ids = np.concatenate([np.asarray(r, np.int32) for r in rows])
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    second = [len(r) for r in rows] if second_at is None else second_at
    types = np.concatenate([np.arange(len(r)) >= at for r, at in zip(rows, second, strict=True)]).astype(np.int8)
    return TokenSplit("train", TokenTable(ids, offsets, types), None if labels is None else np.array(labels))


def _assembler(padding: str, **options) -> Collator:
    settings = {"max_length": 9, "pad_id": 0, "gives_types": True, "device": HOST, **options}
    return Collator(padding=padding, **settings)
