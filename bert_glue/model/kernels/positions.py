"""Positions inside the layers: rotary positions that begin anew in each sequence, and buckets of relative positions.

The buckets are transformers' own, computed with the same operations in fp32: a distance on the border of two buckets
must fall into the same one.
"""

from __future__ import annotations

import math

import torch

from bert_glue.data.packing import PackedLayout

# transformers' MPNet divides distances among this many buckets, whatever the size of its table is.
MPNET_BUCKETS = 32


class Rotary:
    """The rotation of each token of a batch by its position in its own sequence (Su et al. 2021, arXiv 2104.09864).

    Args:
        position_ids: `[tokens]` integers, from 0 in each sequence.
        dim: elements of one head, even.
        base: base of the angles, > 0.
        dtype: dtype of the layers, to which transformers rounds cosines and sines.
    """

    def __init__(self, position_ids: torch.Tensor, dim: int, base: float, dtype: torch.dtype):
        halves = torch.arange(0, dim, 2, dtype=torch.float, device=position_ids.device)
        angles = position_ids[:, None].float() * (1.0 / base ** (halves / dim))
        self.cos, self.sin = (x.to(dtype).float()[:, None] for x in (angles.cos(), angles.sin()))


class _Rotation(torch.autograd.Function):
    """`[tokens, heads, dim]`, turned; the backward pass turns the gradient the other way and keeps no activation."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, -1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, 1), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    # Four passes over half of the elements; products and sums of whole tensors and their halves would be ten.
    first, second = x.to(cos.dtype).chunk(2, -1)
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    left, right = out.chunk(2, -1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=sign)
    torch.mul(second, cos, out=right).addcmul_(first, sin, value=-sign)
    return out.to(x.dtype)


def rotate(
    query: torch.Tensor, key: torch.Tensor, rotary: Rotary, cls_positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key `[tokens, heads, dim]`, turned by the position of each token.

    Args:
        cls_positions: given where only first tokens have a query; those are at position 0, which turns nothing.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    cos, sin = rotary.cos.to(dtype), rotary.sin.to(dtype)
    turned = query if cls_positions is not None else _Rotation.apply(query, cos, sin)
    return turned, _Rotation.apply(key, cos, sin)


def mean_of_sequences(x: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """`[tokens, hidden]` -> the mean of each sequence's tokens, `[sequences, hidden]`; filler is left out."""
    # One product with ones: no scattered sum, whose order changes from run to run on a GPU. In fp32, because a sum of
    # 8,192 tokens exceeds fp16.
    ends = torch.tensor(layout.cu_seq_lens[: len(layout.lengths) + 1])
    token = torch.arange(layout.tokens)
    is_own = (token >= ends[:-1, None]) & (token < ends[1:, None])
    ones = is_own.to(torch.promote_types(x.dtype, torch.float32)).to(x.device, non_blocking=True)
    lengths = torch.tensor(layout.lengths, dtype=ones.dtype)[:, None].to(x.device, non_blocking=True)
    with torch.autocast(x.device.type, enabled=False):
        return (ones @ x.to(ones.dtype) / lengths).to(x.dtype)


def distances(width: int) -> torch.Tensor:
    """Positions of queries less those of keys in rows of `width` tokens, ascending, `[2 * width - 1]` int64."""
    return torch.arange(1 - width, width)


def mpnet_buckets(distance: torch.Tensor, count: int, longest: int = 128) -> torch.Tensor:
    """The bucket of each distance of query and key, as in T5 (Raffel et al. 2020, arXiv 1910.10683).

    Args:
        distance: int64, any shape.
        count: buckets, half of them for keys after their query.
        longest: distance from which on all share the last bucket.
    """
    half = count // 2
    exact = half // 2
    size = distance.abs()
    by_logarithm = torch.log(size.float() / exact) / math.log(longest / exact) * (half - exact)
    far = (exact + by_logarithm.clamp(min=0).to(torch.long)).clamp(max=half - 1)
    return (distance < 0).long() * half + torch.where(size < exact, size, far)


def deberta_rows(distance: torch.Tensor, span: int, has_buckets: bool, longest: int) -> torch.Tensor:
    """The row of the table of relative positions for each distance of query and key, int64 in [0, 2 * span).

    Args:
        distance: int64, any shape.
        span: rows on each side; also the number of buckets.
        has_buckets: whether distances beyond `span / 2` share rows by their logarithm.
        longest: distance of the last bucket, tokens.
    """
    place = distance
    if has_buckets:
        middle = span // 2
        size = torch.where(distance.abs() < middle, torch.tensor(middle - 1), distance.abs())
        steps = torch.log(size / middle) / torch.log(torch.tensor((longest - 1) / middle)) * (middle - 1)
        bucket = (torch.ceil(steps) + middle) * torch.sign(distance)
        place = torch.where(size <= middle, distance.to(bucket.dtype), bucket).long()
    return (place + span).clamp(0, 2 * span - 1)
