"""Attention whose scores depend on relative positions: MPNet's bias and DeBERTa's disentangled terms.

Rows of the table are read once for each shape of block, not for each row: in a block, a query at cell q and a key at
cell k are q - k apart, whichever sequences lie there. A term of all queries with all distances is one product, whose
diagonals are then seen as scores by their strides, without a gather: `[cells, 2 * cells - 1]` read with a stride one
shorter than its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from bert_glue.data.packing import Cells, PackedLayout
from bert_glue.devices.device import has_slow_products
from bert_glue.model.attention import PATHS_TAKEN
from bert_glue.model.kernels.blocks import (
    BLOCK_SHAPES,
    BlockAttention,
    block_buffer,
    drop_probabilities,
    gathered,
    kept_scale,
    part_of,
    scaled_product,
    scores_gradient,
)
from bert_glue.model.kernels.padded import first_token_attention, sdpa_blocks
from bert_glue.model.kernels.positions import MPNET_BUCKETS, deberta_rows, distances, mpnet_buckets
from bert_glue.model.layers import DropoutMasks
from bert_glue.model.shape import EncoderShape


@dataclass(frozen=True)
class RelativeTable:
    """What a batch needs of a table of relative positions.

    Args:
        width: cells of the widest block.
        rows: the rows in use, `[rows, hidden]`, or of MPNet the bias of each distance, `[2 * width - 1, heads]`.
        of_distance: row of each distance from `1 - width` to `width - 1`, int64 on the device.
        scale: factor of all products of a score.
        biases: MPNet: bias of each block, `[heads, cells, cells]`.
        products: DeBERTa: term -> keys or queries of the rows, `[rows, heads, dim]`.
    """

    width: int
    rows: torch.Tensor
    of_distance: torch.Tensor
    scale: float | None = None
    biases: tuple[torch.Tensor, ...] = ()
    products: dict[str, torch.Tensor] = field(default_factory=dict)

    def with_products(self, products: dict[str, torch.Tensor]) -> RelativeTable:
        """This table with one layer's products of its rows."""
        return replace(self, products=products)

    def product(self, term: str, width: int) -> torch.Tensor | None:
        """A term's keys or queries for rows of `width` cells, `[2 * width - 1, heads, dim]`, by ascending distance."""
        if term not in self.products:
            return None
        inner = self.of_distance[self.width - width : self.width + width - 1]
        return self.products[term].index_select(0, inner)

    def from_first(self, term: str, count: int) -> torch.Tensor | None:
        """A term's keys or queries for a first token and the first `count` keys, `[count, heads, dim]`."""
        found = self.product(term, count)
        return None if found is None else found[:count].flip(0)


def read_table(rows: torch.Tensor, shape: EncoderShape, layout: PackedLayout) -> RelativeTable:
    """The part of a table of relative positions that the blocks of a batch need.

    Args:
        rows: the whole table, `[rows, hidden]`, or of MPNet `[buckets, heads]`.
    """
    width = max(block.shape[1] for block in layout.blocks)
    apart = distances(width)
    kind = shape.disentangled
    if kind is None:
        bucket = mpnet_buckets(apart, MPNET_BUCKETS).to(rows.device, non_blocking=True)
        found = rows.index_select(0, bucket)
        by_width = {block.shape[1]: None for block in layout.blocks}
        for own in by_width:
            by_width[own] = _Diagonals.apply(found[width - own : width + own - 1].t().contiguous())
        return RelativeTable(width, found, bucket, biases=tuple(by_width[block.shape[1]] for block in layout.blocks))
    row = deberta_rows(apart, kind.span, kind.buckets, kind.longest)
    first, last = int(row[0]), int(row[-1])  # rows ascend with the distance
    of_distance = (row - first).to(rows.device, non_blocking=True)
    scale = 1.0 / math.sqrt(shape.hidden // shape.heads * (1 + len(kind.terms)))
    return RelativeTable(width, rows[first : last + 1], of_distance, scale)


def _diagonals(x: torch.Tensor, width: int) -> torch.Tensor:
    """`[n, width, 2 * width - 1]` -> the view `[n, width, width]` with element [i, j] from column width - 1 - i + j."""
    pitch = 2 * width - 1
    return x.as_strided((len(x), width, width), (width * pitch, pitch - 1, 1), x.storage_offset() + width - 1)


class _Diagonals(torch.autograd.Function):
    """`[heads, 2 * width - 1]`, by ascending distance of query and key -> `[heads, queries, keys]`."""

    @staticmethod
    def forward(ctx, by_distance):
        width = (by_distance.shape[1] + 1) // 2
        rows = by_distance.flip(1)[:, None].expand(-1, width, -1).contiguous()
        return _diagonals(rows, width).contiguous()

    @staticmethod
    def backward(ctx, grad):
        heads, width = grad.shape[:2]
        rows = grad.new_zeros(heads, width, 2 * width - 1)
        _diagonals(rows, width).copy_(grad)
        return rows.sum(1).flip(1)


def attend_relative(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    first_only: bool,
    drop: float,
    dropout_masks: DropoutMasks | None,
    mask_id: int,
    table: RelativeTable,
) -> torch.Tensor:
    """Attention within each sequence with scores by relative position; the arguments are those of `attend`."""
    if dropout_masks is not None and drop >= 1.0:
        return torch.zeros_like(query)
    dtype, kind = value.dtype, query.device.type
    rate = drop if dropout_masks is not None else 0.0
    if not has_slow_products(kind, dtype):
        return _attend(query, key, value, layout, first_only, rate, dropout_masks, mask_id, table)
    with torch.autocast(kind, enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        in_fp32 = replace(
            table,
            rows=table.rows.float(),
            biases=tuple(bias.float() for bias in table.biases),
            products={term: product.float() for term, product in table.products.items()},
        )
        return _attend(query, key, value, layout, first_only, rate, dropout_masks, mask_id, in_fp32).to(dtype)


def _attend(query, key, value, layout, first_only, drop, dropout_masks, mask_id, table) -> torch.Tensor:
    if first_only:
        bias = _first_token_bias(table)
        return first_token_attention(query, key, value, layout, drop, dropout_masks, mask_id, bias, table.scale)
    if query.is_cpu:
        return attend_on_cpu(query, key, value, layout, drop, dropout_masks, mask_id, table)
    return attend_elsewhere(query, key, value, layout, drop, table)


def attend_on_cpu(query, key, value, layout, drop, dropout_masks, mask_id, table) -> torch.Tensor:
    """CPU: blocks of rows with a backward pass by hand; the arguments are those of `attend_relative`."""
    PATHS_TAKEN.add("packed: blocks of rows with scores by relative position")
    if table.scale is None:
        return BlockAttention.apply(query, key, value, layout, False, drop, dropout_masks, mask_id, *table.biases)
    positions = (table.product(term, table.width) for term in ("c2p", "p2c"))
    return DisentangledAttention.apply(query, key, value, layout, drop, dropout_masks, mask_id, table.scale, *positions)


def attend_elsewhere(query, key, value, layout, drop, table) -> torch.Tensor:
    """CUDA and NPU: no packed kernel there takes a bias, so that blocks go through torch's fused attention with one."""
    PATHS_TAKEN.add("blocks with a bias by relative position")
    if table.scale is None:
        return sdpa_blocks(query, key, value, layout, drop, lambda number, q, k: table.biases[number])
    # Scaled before the products: in fp16 a sum of three products overflows where its scaled terms do not.
    return sdpa_blocks(query * table.scale, key, value, layout, drop, _block_bias(table), 1.0)


def _first_token_bias(table: RelativeTable) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def bias(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        count = k.shape[2]
        if table.scale is None:
            return table.rows[table.width - count : table.width].flip(0).t()[None, :, None]
        total = 0.0
        if (positions := table.from_first("c2p", count)) is not None:
            total = q @ positions.permute(1, 2, 0)
        if (positions := table.from_first("p2c", count)) is not None:
            total = total + (k * (positions * table.scale).transpose(0, 1)).sum(-1)[:, :, None]
        return total

    return bias


def _block_bias(table: RelativeTable) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    def bias(number: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        rows, heads, width = q.shape[:3]
        # Column of distance q - k for each pair, once a shape of block.
        apart = torch.arange(width)[:, None] - torch.arange(width) + width - 1
        column = apart.to(q.device, non_blocking=True).expand(rows, heads, -1, -1)
        total = 0.0
        if (positions := table.product("c2p", width)) is not None:
            total = (q @ positions.permute(1, 2, 0)).gather(-1, column)
        if (positions := table.product("p2c", width)) is not None:
            by_key = k @ (positions * table.scale).permute(1, 2, 0)
            total = total + by_key.gather(-1, column.transpose(-1, -2)).transpose(-1, -2)
        return total

    return bias


class DisentangledAttention(torch.autograd.Function):
    """DeBERTa's attention on a CPU: softmax((q k' + q pk' + k pq') scale) v, block by block.

    Rows of one head lie together, so that the products with positions are one a head and need no copy of the positions
    for every row. `c2p` and `p2c` are `[2 * width - 1, heads, dim]` by ascending distance, or None.
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, drop, dropout_masks, mask_id, scale, c2p, p2c):
        heads = query.shape[1]
        head_rows = layout.head_rows(heads, Cells.QUERIES, heads_first=True)
        saved = []
        out = block_buffer(query, head_rows)
        for number, block in enumerate(layout.blocks):
            BLOCK_SHAPES.add(block.shape)
            q = gathered(query, head_rows, number).mul_(scale)
            k, v = (gathered(x, head_rows, number) for x in (key, value))
            scores = torch.bmm(q, k.transpose(1, 2))
            _add_positions(scores, q, k, c2p, p2c, scale)
            hidden = block.hidden_keys(first_only=False)
            if hidden is not None:
                by_head = scores.view(heads, -1, *scores.shape[1:])
                by_head.masked_fill_(hidden[:, 0], torch.finfo(scores.dtype).min)
            probabilities = torch.softmax(scores, -1)
            mask = (tuple(scores.shape), drop, dropout_masks, mask_id * 4096 + number)
            keep, dropped = drop_probabilities(probabilities, *mask)
            scaled_product(part_of(out, head_rows, number, q), dropped, v, kept_scale(drop))
            saved += [q, k, v, probabilities, keep]
        ctx.save_for_backward(c2p, p2c, *saved)
        ctx.layout, ctx.scale, ctx.drop = layout, scale, drop
        return head_rows.in_order(out).view(query.shape)

    @staticmethod
    def backward(ctx, grad):
        layout, scale = ctx.layout, ctx.scale
        heads, dim = grad.shape[1:]
        head_rows = layout.head_rows(heads, Cells.QUERIES, heads_first=True)
        c2p, p2c, *saved = ctx.saved_tensors
        totals = [None if x is None else torch.zeros_like(x) for x in (c2p, p2c)]
        dq, dk, dv = (block_buffer(grad, head_rows) for _ in range(3))
        for number in range(len(layout.blocks)):
            q, k, v, probabilities, keep = saved[5 * number : 5 * number + 5]
            g = gathered(grad, head_rows, number)
            g.view(-1, dim).index_fill_(0, head_rows.empty(number), 0.0)
            ds = scores_gradient(g, v, probabilities, keep, ctx.drop, part_of(dv, head_rows, number, v))
            of_q, of_k = (part_of(d, head_rows, number, q) for d in (dq, dk))
            torch.bmm(ds, k, out=of_q)
            torch.bmm(ds.transpose(1, 2), q, out=of_k)
            _positions_backward(ds, (q, k), (of_q, of_k), (c2p, p2c), totals, scale)
        dq.mul_(scale)
        of_inputs = (head_rows.in_order(d).view(-1, heads, dim) for d in (dq, dk, dv))
        return *of_inputs, *([None] * 5), *totals


def _inner(positions: torch.Tensor, width: int) -> torch.Tensor:
    """The rows of a term that blocks of `width` cells need, `[2 * width - 1, heads, dim]`."""
    most = (len(positions) + 1) // 2
    return positions[most - width : most + width - 1]


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.view(heads, -1, x.shape[-1])


def _add_positions(scores, q, k, c2p, p2c, scale: float) -> None:
    width = scores.shape[-1]
    if c2p is not None:
        # Descending distance: along a row of scores the key advances and q - k falls.
        by_query = torch.bmm(_by_head(q, c2p.shape[1]), _inner(c2p, width).flip(0).permute(1, 2, 0))
        scores.add_(_diagonals(by_query.view(len(q), width, -1), width))
    if p2c is not None:
        by_key = torch.bmm(_by_head(k, p2c.shape[1]), (_inner(p2c, width) * scale).permute(1, 2, 0))
        scores.add_(_diagonals(by_key.view(len(k), width, -1), width).transpose(1, 2))


def _positions_backward(ds, inputs, of_inputs, terms, totals, scale: float) -> None:
    """Add the gradients of both terms to those of queries and keys, and to `totals`."""
    width = ds.shape[-1]
    rows = ds.new_zeros(len(ds), width, 2 * width - 1)
    for number, (x, of_x, positions, total) in enumerate(zip(inputs, of_inputs, terms, totals, strict=True)):
        if positions is None:
            continue
        heads = positions.shape[1]
        # Outside its diagonals the buffer stays zero, so that one serves both terms.
        _diagonals(rows, width).copy_(ds.transpose(1, 2) if number else ds)
        own = _inner(positions, width)
        own = own * scale if number else own.flip(0)
        _by_head(of_x, heads).baddbmm_(_by_head(rows, heads), own.transpose(0, 1))
        found = torch.bmm(_by_head(rows, heads).transpose(1, 2), _by_head(x, heads)).transpose(0, 1)
        _inner(total, width).add_(found * scale if number else found.flip(0))
