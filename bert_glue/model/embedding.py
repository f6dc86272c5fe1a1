"""Embeddings whose gradients cost what the tokens of a batch cost, and not what the whole table costs.

torch's gradient of a table is a new tensor of the table's size, which autograd then adds to `.grad`: 4 ms a step for
the 13,000 words of MRPC at a width of 384. On a CPU the rows of a batch are added to `.grad` instead, in 0.2 ms. On
devices that are slow to add rows by index, matrix products compute the gradient.
"""

from __future__ import annotations

import torch
from torch import nn

from bert_glue.devices.device import has_slow_scatter

# Up to so many rows a table's gradient is the product of one-hot rows with the gradients of the tokens: 2 ms of a CPU,
# but 20 microseconds of a GPU for 14,000 tokens and a table of 512 positions [estimate].
_SMALL_TABLE = 1024
# Up to so many tokens every token finds the tokens of its own word by one product of `[tokens, tokens]`, 32 MB in 16
# bits. Above it torch sorts the tokens itself (torch 2.13, aten/src/ATen/native/cuda/Embedding.cu).
_MOST_TOKENS = 4096


class Embedding(nn.Embedding):
    """`[tokens] -> [tokens, width]`, as `nn.Embedding`."""

    adds_into_grad = False  # `flatten` sets it: `.grad` must be a view that stays where it is

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids`, int64."""
        if self._adds_into_grad():
            return _RowsIntoGrad.apply(self.weight, ids)
        if torch.is_grad_enabled() and has_slow_scatter(ids.device.type):
            return _Rows.apply(self.weight, ids)
        return super().forward(ids)

    def _adds_into_grad(self) -> bool:
        return (
            self.adds_into_grad
            and self.weight.is_cpu
            and self.weight.grad is not None
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )


class _RowsIntoGrad(torch.autograd.Function):
    """The rows of a table on a CPU; backward adds to the table's `.grad`."""

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.leaf = weight
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        # torch sorts the ids and gives each row to one thread, so that a row's sum has one order.
        ctx.leaf.grad.index_add_(0, ctx.saved_tensors[0], grad)
        return None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        return row_sums(grad, ctx.saved_tensors[0], ctx.rows), None


def row_sums(grad: torch.Tensor, ids: torch.Tensor, rows: int) -> torch.Tensor:
    """The gradient of a table: the sum of the gradients of the tokens that read each row, `[rows, width]`.

    Products add in fp32 and round once, in an order that does not depend on the device's scheduler. A gradient that is
    not finite reaches every row: the step is skipped or the run stops all the same, because its norm is not finite.

    Args:
        grad: `[tokens, width]`.
        ids: row that each token read, `[tokens]` int64.
    """
    if rows <= _SMALL_TABLE:
        reads = torch.arange(rows, device=ids.device)[:, None] == ids
        return reads.to(grad.dtype) @ grad
    if len(ids) > _MOST_TOKENS:
        return torch.ops.aten.embedding_dense_backward(grad, ids, rows, -1, False)
    same = ids[:, None] == ids
    order = torch.arange(len(ids), device=ids.device)
    is_repeated = (same & (order < order[:, None])).any(1)
    # A word's first token writes the sum. The others write to a row of their own behind the table, because sums of one
    # word could differ in the last bit from one row of the product to another, and the last write would win.
    place = torch.where(is_repeated, rows, ids)
    sums = same.to(grad.dtype) @ grad
    return grad.new_zeros(rows + 1, grad.shape[1]).index_copy_(0, place, sums)[:rows]
