"""A linear layer whose weight gradient goes straight into the flat gradient buffer, with the fastest product there is.

autograd would put the product into a new tensor and then add it to `.grad`: two more passes over memory
for every weight, and fresh pages for every temporary. With flat views (see flat.py) the product
accumulates where it belongs.

On a CPU with AVX-512 the products, forward and backward, are oneDNN's. torch's own are MKL's there, which leaves half
of the vector width unused on AMD processors: 110 GFLOP/s a core where oneDNN gets 230.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bert_glue.device import has_onednn_linear, has_slow_products
from bert_glue.low_rank import LowRank
from bert_glue.noise import Noise

_LOW_RANK_SITES = 1 << 20  # above every address of a dropout in the model itself
# Multiply-adds. Every number of rows is another kernel, which takes oneDNN half a millisecond to make.
_LEAST_FOR_ONEDNN, _ROWS_OF_A_GRAPH = 1 << 26, 512


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    # A graph serves all numbers of rows, each a bucket that comes again: there the weight alone decides.
    rows = _ROWS_OF_A_GRAPH if torch.compiler.is_compiling() else len(x)
    return (
        x.dtype == weight.dtype == torch.float32
        and rows * weight.numel() >= _LEAST_FOR_ONEDNN
        and has_onednn_linear(x.device.type, not weight.is_contiguous())
    )


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # What inductor calls (torch 2.13).
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# The same inside a compiled graph, which calls it: inductor takes torch's own name for one with constant weights.
_onednn_in_graph = torch.library.custom_op(
    "bert_glue::product", _onednn, mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
_onednn_in_graph.register_fake(lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`[rows, in] -> [rows, out]`, as `F.linear`, but for gradients, of which it has none."""
    if not _is_for_onednn(x, weight):  # by size and not by a stopwatch: a resumed run must compute the same
        return F.linear(x, weight, bias)
    return (_onednn_in_graph if torch.compiler.is_compiling() else _onednn)(x, weight, bias)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b`."""
    if _is_for_onednn(a, b.t()):
        total.add_(_onednn(a, b.t(), None))
    else:
        total.addmm_(a, b)


class _Linear(torch.autograd.Function):
    """Gradients of weight and bias as autograd wants them."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            multiply(grad, weight.t()) if needs_x else None,
            multiply(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


class _LinearIntoGrad(torch.autograd.Function):
    """Gradients of some outputs' weight and bias added to the parameters' own."""

    @staticmethod
    def forward(ctx, x, weight, bias, which):
        ctx.save_for_backward(x, weight)
        ctx.parameters, ctx.which = (weight, bias), which
        return multiply(x, weight[which], bias[which])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        leaf_weight, leaf_bias = ctx.parameters
        _add_product(leaf_weight.grad[ctx.which], grad.t(), x)
        leaf_bias.grad[ctx.which].add_(grad.sum(0))
        return (multiply(grad, weight[ctx.which].t()) if ctx.needs_input_grad[0] else None), None, None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`[rows, in] -> [rows, out]`, as `F.linear`.

    Where a CPU has no products of a 16-bit dtype, they are computed in fp32 and rounded, as tensor cores
    do: the same numbers, and 10 times the speed of torch's own loops there.
    """
    kind = x.device.type
    is_autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_autocast else x.dtype
    if not is_autocast and _is_for_onednn(x, weight):
        return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else multiply(x, weight, bias)
    if not has_slow_products(kind, dtype):
        return F.linear(x, weight, bias)
    with torch.autocast(kind, enabled=False):
        in_fp32 = (tensor if tensor is None else tensor.to(dtype).float() for tensor in (x, weight, bias))
        return F.linear(*in_fp32).to(dtype)


class Linear(nn.Linear):
    """`[rows, in_features] -> [rows, out_features]`, as `nn.Linear`, always with a bias.

    With `low_rank` set, its term is added; `noise` and `site` are for that term's dropout.
    """

    adds_into_grad = False  # set where gradients are flat views of the parameters' own dtype

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.low_rank: LowRank | None = None

    def forward(self, x: torch.Tensor, noise: Noise | None = None, site: int = 0) -> torch.Tensor:
        """All of the outputs."""
        return self.rows(x, slice(None), noise, site)

    def rows(self, x: torch.Tensor, which: slice, noise: Noise | None, site: int) -> torch.Tensor:
        """Some of the outputs: `[rows, in_features] -> [rows, which]`.

        Into `.grad` where that is a flat view and no cast is in between; plain autograd otherwise.
        """
        if self._adds_into_grad(x):
            return _LinearIntoGrad.apply(x, self.weight, self.bias, which)
        y = linear(x, self.weight[which], self.bias[which])
        if self.low_rank is None:
            return y
        return self.low_rank.add(y, x, linear, noise, _LOW_RANK_SITES + site, which)

    def _adds_into_grad(self, x: torch.Tensor) -> bool:
        return not (
            torch.compiler.is_compiling()
            or not self.adds_into_grad
            or self.weight.grad is None
            or self.bias.grad is None
            or not torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or has_slow_products(x.device.type, x.dtype)
        )
