"""Attention over blocks of padded rows on any device, by torch's own operators: what no packed kernel computes.

Scores with a bias by relative position, and windows, where a device has no variable-length kernel for them. Rows are
gathered from the packed tokens and put back, so that memory grows with the blocks and not with the longest row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bert_glue.data.packing import AttentionBlock, PackedLayout, width_bucket
from bert_glue.model.layers import DropoutMasks, dropout

# In place of -inf, which counts as an overflow on NPUs that saturate; exp(-1e4) is 0 in every dtype (BERT's own value).
_HIDDEN = -1e4
# Of a block's number, queries and keys `[rows, heads, cells, dim]`: what scores gain, `[.., heads, cells, cells]`.
BlockBias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    drop: float,
    bias: BlockBias | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of every token, `[tokens, heads, dim]`, one fused call a block.

    Args:
        drop: dropout of probabilities by torch's own generator, in [0, 1).
        bias: what the scores of a block gain; None for nothing.
        scale: factor of the products; None for 1 / sqrt(dim).
    """
    device, heads = query.device, query.shape[1]
    found, cells = [], []
    for number, block in enumerate(layout.blocks):
        q = _rows(query, block.tokens)
        k, v = (_rows(x, block.keys) for x in (key, value))
        mask = _as_bias(block, q)
        if bias is not None:
            added = bias(number, q, k)
            mask = added if mask is None else added + mask
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, scale=scale)
        found.append(out.transpose(1, 2).flatten(0, 1))
        cells.append(block.tokens.flatten())
    where = torch.cat(cells)
    order = torch.full((layout.tokens,), len(where))
    order[where[where >= 0]] = (where >= 0).nonzero()[:, 0]
    # Filler is in no block and gets the row of zeros.
    nothing = query.new_zeros(1, heads, value.shape[-1])
    return torch.cat([*found, nothing]).index_select(0, order.to(device, non_blocking=True))


def _rows(x: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, dim]` -> `[rows, heads, cells, dim]`; empty cells repeat the first token."""
    index = cells.clamp(min=0).flatten().to(x.device, non_blocking=True)
    return x.index_select(0, index).view(*cells.shape, *x.shape[1:]).transpose(1, 2)


def _as_bias(block: AttentionBlock, like: torch.Tensor) -> torch.Tensor | None:
    hidden = block.hidden_keys(first_only=False)
    if hidden is None:
        return None
    return torch.where(hidden, _HIDDEN, 0.0).to(like.dtype).to(like.device, non_blocking=True)


def first_token_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    drop: float,
    dropout_masks: DropoutMasks | None,
    mask_id: int,
    bias: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of the first token of each sequence, `[sequences, heads, dim]`, within the layout's window.

    Args:
        bias: function of queries `[sequences, heads, 1, dim]` and keys `[sequences, heads, keys, dim]` that returns
            what the scores gain; None for nothing.
        scale: factor of the products; None for 1 / sqrt(dim).
    """
    starts = torch.tensor(layout.cu_seq_lens[:-1])[:, None]
    # Of filler only the first token is computed, because its width would be another in every batch.
    lengths = torch.tensor((*layout.lengths, 1) if layout.tail else layout.lengths)[:, None]
    seen = lengths if layout.window is None else lengths.clamp(max=layout.window + 1)
    columns = torch.arange(width_bucket(int(seen.max())))[None]
    is_real = columns < seen
    cells = torch.where(is_real, starts + columns, starts)
    k, v = (_rows(x, cells) for x in (key, value))
    q = (query * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale))[:, :, None]
    scores = q @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias(q, k)
    mask = torch.where(is_real, 0.0, _HIDDEN)[:, None, None].to(scores.dtype).to(scores.device, non_blocking=True)
    probabilities = torch.softmax(scores + mask, -1, torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    # As in blocks, the number of the mask within the layer follows the layer's own.
    return (dropout(probabilities, drop, dropout_masks, mask_id * 4096) @ v)[:, :, 0]
