"""Attention on a CPU: one batched product a block of rows, forward and backward by hand.

By hand because torch's CPU kernel with dropout falls back to a chain of a dozen autograd nodes a call, and a
batch of 32 sequences makes 1 to 5 calls a layer. A block's rows are gathered in one copy and put back in one.
"""

from __future__ import annotations

import math

import torch

from bert_glue.data.packing import AttentionBlock, Cells, HeadRows, PackedLayout
from bert_glue.model.layers import DropoutMasks, as_numbers

# Rows and width of the padded blocks that it computed so far, with gradients: each is a kernel of its own.
BLOCK_SHAPES: set[tuple[int, int]] = set()


def drop_probabilities(
    probabilities: torch.Tensor, shape: tuple[int, ...], drop: float, dropout_masks: DropoutMasks | None, mask_id: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The mask of a block and the probabilities that it keeps, both `[rows * heads, queries, keys]`.

    Those are not scaled: `kept_scale` is a factor of the products that read them, which costs no pass.

    Args:
        shape: of the mask as it is drawn, with as many elements.
        drop: in [0, 1); 0 gives no mask and the same probabilities.
    """
    if drop == 0.0:
        return None, probabilities
    # The mask is kept in bytes, a quarter of the size of the dropped probabilities in fp32. Backward computes those
    # again in one pass.
    keep = dropout_masks.keep(shape, drop, mask_id).view(probabilities.shape)
    return keep, as_numbers(keep, probabilities.dtype).mul_(probabilities)


def kept_scale(drop: float) -> float:
    """Factor of the probabilities that a dropout of `drop`, in [0, 1), keeps."""
    return 1.0 / (1.0 - drop)


def scores_gradient(
    g: torch.Tensor,
    v: torch.Tensor,
    probabilities: torch.Tensor,
    keep: torch.Tensor | None,
    drop: float,
    dv: torch.Tensor,
) -> torch.Tensor:
    """The gradient of a block's scores, `[rows * heads, queries, keys]`; that of its values is written to `dv`.

    Args:
        g: gradient of the block's output, `[rows * heads, queries, dim]`.
        keep: result of `drop_probabilities`.
    """
    dp = scaled_product(torch.empty_like(probabilities), g, v.transpose(1, 2), kept_scale(drop))
    dropped = probabilities
    if keep is not None:
        kept = as_numbers(keep, probabilities.dtype)
        dp.mul_(kept)
        dropped = kept.mul_(probabilities)
    scaled_product(dv, dropped.transpose(1, 2), g, kept_scale(drop))
    return torch._softmax_backward_data(dp, probabilities, -1, probabilities.dtype)


class BlockAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(dim) + bias) v, block by block; the arguments are those of `attend`.

    After them comes a bias for each block, `[heads, queries, keys]`, which all of its rows share, or none.
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, first_only, drop, dropout_masks, mask_id, *biases):
        heads, dim = query.shape[1:]
        scale = 1.0 / math.sqrt(dim)
        drop = drop if dropout_masks is not None else 0.0
        q_rows, k_rows = _head_rows(layout, heads, first_only)
        saved = []
        out = block_buffer(query, q_rows)
        for number, block in enumerate(layout.blocks):
            BLOCK_SHAPES.add(block.shape)
            q = gathered(query, q_rows, number)
            k = gathered(key, k_rows, number)
            v = gathered(value, k_rows, number)
            probabilities = _softmax_block(q, k, block, first_only, scale, biases[number] if biases else None)
            shape = (len(block.tokens), heads, *probabilities.shape[1:])
            keep, dropped = drop_probabilities(probabilities, shape, drop, dropout_masks, mask_id * 4096 + number)
            scaled_product(part_of(out, q_rows, number, q), dropped, v, kept_scale(drop))
            saved += [q, k, v, probabilities, keep]
        ctx.save_for_backward(*saved)
        ctx.layout = layout
        ctx.first_only = first_only
        ctx.scale = scale
        ctx.drop = drop
        ctx.has_biases = bool(biases)
        return q_rows.in_order(out).view(query.shape)

    @staticmethod
    def backward(ctx, grad):
        layout, scale = ctx.layout, ctx.scale
        heads, dim = grad.shape[1:]
        q_rows, k_rows = _head_rows(layout, heads, ctx.first_only)
        of_biases = []
        # Read once: under gradient checkpointing every access unpacks the tensors, and torch refuses the second.
        saved = ctx.saved_tensors
        dq, dk, dv = (block_buffer(grad, head_rows) for head_rows in (q_rows, k_rows, k_rows))
        for number in range(len(layout.blocks)):
            q, k, v, probabilities, keep = saved[5 * number : 5 * number + 5]
            g = gathered(grad, q_rows, number)
            # Cells without a token repeat the first token's gradient, which would then count once for each cell.
            g.view(-1, dim).index_fill_(0, q_rows.empty(number), 0.0)
            ds = scores_gradient(g, v, probabilities, keep, ctx.drop, part_of(dv, k_rows, number, k))
            scaled_product(part_of(dq, q_rows, number, q), ds, k, scale)
            scaled_product(part_of(dk, k_rows, number, k), ds.transpose(1, 2), q, scale)
            if ctx.has_biases:
                of_biases.append(ds.view(-1, heads, *ds.shape[1:]).sum(0))
        pairs = ((dq, q_rows), (dk, k_rows), (dv, k_rows))
        of_inputs = (rows.in_order(d).view(-1, heads, dim) for d, rows in pairs)
        return *of_inputs, *([None] * 5), *of_biases


def _head_rows(layout: PackedLayout, heads: int, first_only: bool) -> tuple[HeadRows, HeadRows]:
    queries = Cells.FIRST if first_only else Cells.QUERIES
    return layout.head_rows(heads, queries), layout.head_rows(heads, Cells.KEYS)


def gathered(x: torch.Tensor, head_rows: HeadRows, number: int) -> torch.Tensor:
    """`[n, heads, dim]` -> `[rows * heads, width, dim]`, of one block.

    Rows of one head are copied whole, also out of the joint product of query, key and value: a fifth of the time that
    an index over tokens and heads takes.
    """
    heads, dim = x.shape[1:]
    if x.stride(1) != dim or x.stride(2) != 1 or x.stride(0) % dim:
        x = x.contiguous()
    pitch = x.stride(0) // dim
    by_head = x.as_strided(((len(x) - 1) * pitch + heads, dim), (dim, 1))
    rows, width = head_rows.count(number)
    return by_head.index_select(0, head_rows.index(number, pitch)).view(rows * heads, width, dim)


def block_buffer(like: torch.Tensor, head_rows: HeadRows) -> torch.Tensor:
    """Memory of all blocks, `[rows of a head, dim]`, which one `index_select` then puts back into token order."""
    rows = like.new_empty(head_rows.rows, like.shape[-1])
    rows[-1] = 0.0  # what filler gets: it is in no block
    return rows


def part_of(rows: torch.Tensor, head_rows: HeadRows, number: int, like: torch.Tensor) -> torch.Tensor:
    """One block's part of `_block_buffer`, `[rows * heads, width, dim]`."""
    return rows[slice(*head_rows.bounds[number])].view(like.shape)


def scaled_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """`out = scale * a @ b`, a product for each of the first dimension."""
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def _softmax_block(
    q: torch.Tensor,
    k: torch.Tensor,
    block: AttentionBlock,
    first_only: bool,
    scale: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    scores = scaled_product(q.new_empty(len(q), q.shape[1], k.shape[1]), q, k.transpose(1, 2), scale)
    if bias is not None:
        scores.view(-1, *bias.shape).add_(bias)
    hidden = block.hidden_keys(first_only)
    if hidden is not None:
        # In place: scores of `[rows * heads, width, width]` are the largest tensor of a layer.
        scores.view(len(hidden), -1, *scores.shape[1:]).masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)
