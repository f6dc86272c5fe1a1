"""An attention kernel that loops over sequences: the plain reference."""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def _loop_kernel(calls: list):
    """Takes what CUDA's kernels take."""

    def kernel(query, key, value, q_cu_seqlens, k_cu_seqlens, q_longest, k_longest, drop):
        assert q_cu_seqlens.dtype == k_cu_seqlens.dtype == torch.int32
        calls.append((q_longest, k_longest, drop))
        pieces = []
        for (a, b), (c, d) in zip(pairwise(q_cu_seqlens.tolist()), pairwise(k_cu_seqlens.tolist()), strict=True):
            assert b - a <= q_longest and d - c <= k_longest
            scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) / math.sqrt(query.shape[-1])
            shares = torch.nn.functional.dropout(scores.softmax(-1), drop)
            pieces.append(torch.einsum("hqk,khd->qhd", shares, value[c:d]))
        return torch.cat(pieces)

    return kernel
