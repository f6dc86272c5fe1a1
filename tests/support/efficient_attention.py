"""torch's memory-efficient attention over borders, on a CPU: what torch.ops.aten._efficient_attention_forward computes.

torch has it for CUDA alone. The shapes, the checks of the bounds and the results follow
aten/src/ATen/native/transformers/cuda/attention.cu and attention_backward.cu of torch 2.13; dropout is not modelled.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def register() -> torch.library.Library:
    """Both operators for CPU tensors, until the result is destroyed (`_destroy`)."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_efficient_attention_forward", _forward, "CPU")
    library.impl("_efficient_attention_backward", _backward, "CPU")
    return library


def _sequences(query, key, value, q_borders, k_borders):
    """Queries, keys, values and probabilities `[heads, queries, keys]` of each sequence, and where it lies."""
    for (a, b), (c, d) in zip(pairwise(q_borders.tolist()), pairwise(k_borders.tolist()), strict=True):
        q, k, v = query[a:b], key[c:d], value[c:d]
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(query.shape[-1])
        yield slice(a, b), slice(c, d), q, k, v, scores.softmax(-1)


def _forward(query, key, value, bias, q_borders, k_borders, q_longest, k_longest, drop, mask, with_lse=False, **named):
    assert bias is None and mask == 0 and not named
    assert query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == 1
    assert q_borders.dtype == k_borders.dtype == torch.int32 and len(q_borders) == len(k_borders)
    assert max(b - a for a, b in pairwise(q_borders.tolist())) <= q_longest
    assert max(b - a for a, b in pairwise(k_borders.tolist())) <= k_longest
    found = _sequences(query[0], key[0], value[0], q_borders, k_borders)
    out = torch.cat([torch.einsum("hqk,khd->qhd", shares, v) for *_, v, shares in found])[None]
    padded = -(-q_longest // 32) * 32 if with_lse else 0
    lse = query.new_zeros(len(q_borders) - 1, query.shape[2], padded, dtype=torch.float32)
    seed = torch.zeros((), dtype=torch.int64)
    return out, lse, seed, seed.clone(), q_longest, k_longest


def _backward(
    grad, query, key, value, bias, out, q_borders, k_borders, q_longest, k_longest, lse, drop, seed, offset, mask,
    bias_requires_grad, **named,
):  # fmt: skip
    assert q_longest <= query.shape[1] and k_longest <= key.shape[1], "as torch checks it"
    assert lse.shape[2] > 0, "the forward pass kept no log of sums"
    # By hand: below autograd, where a kernel runs, nothing is differentiated.
    d_query, d_key, d_value = (torch.empty_like(x[0]) for x in (query, key, value))
    scale = 1.0 / math.sqrt(query.shape[-1])
    for at, of, q, k, v, shares in _sequences(query[0], key[0], value[0], q_borders, k_borders):
        d_shares = torch.einsum("qhd,khd->hqk", grad[0, at], v)
        d_scores = shares * (d_shares - (d_shares * shares).sum(-1, keepdim=True)) * scale
        d_query[at] = torch.einsum("hqk,khd->qhd", d_scores, k)
        d_key[of] = torch.einsum("hqk,qhd->khd", d_scores, q)
        d_value[of] = torch.einsum("hqk,qhd->khd", shares, grad[0, at])
    return d_query[None], d_key[None], d_value[None], torch.empty(0)
