"""A linear layer whose weight gradient goes straight into the flat gradient buffer.

autograd would put the product into a new tensor and then add it to `.grad`: two more passes over memory
for every weight, and fresh pages for every temporary. With flat views (see flat.py) the product
accumulates where it belongs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bert_glue.device import has_onednn_linear, has_slow_products
from bert_glue.low_rank import LowRank
from bert_glue.noise import Noise

_LOW_RANK_SITES = 1 << 20  # above every address of a dropout in the model itself


class _LinearIntoGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.parameters = weight, bias
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        leaf_weight, leaf_bias = ctx.parameters
        leaf_weight.grad.addmm_(grad.t(), x)
        leaf_bias.grad.add_(grad.sum(0))
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`[rows, in] -> [rows, out]`, as `F.linear`.

    Where a CPU has no products of a 16-bit dtype, they are computed in fp32 and rounded, as tensor cores
    do: the same numbers, and 10 times the speed of torch's own loops there.
    """
    kind = x.device.type
    is_autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_autocast else x.dtype
    if x.dtype == torch.float32 and has_onednn_linear(kind) and not (is_autocast or torch.is_grad_enabled()):
        # What inductor calls (torch 2.13): a tenth faster here than F.linear's product, and without a gradient.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
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
        """Into `.grad` where that is a flat view and no cast is in between; plain autograd otherwise."""
        kind = x.device.type
        if (
            torch.compiler.is_compiling()
            or not self.adds_into_grad
            or self.weight.grad is None
            or self.bias.grad is None
            or not torch.is_grad_enabled()
            or torch.is_autocast_enabled(kind)
            or has_slow_products(kind, x.dtype)
        ):
            return self.rows(x, slice(None), noise, site)
        return _LinearIntoGrad.apply(x, self.weight, self.bias)

    def rows(self, x: torch.Tensor, which: slice, noise: Noise | None, site: int) -> torch.Tensor:
        """Some of the outputs: `[rows, in_features] -> [rows, which]`."""
        y = linear(x, self.weight[which], self.bias[which])
        if self.low_rank is None:
            return y
        return self.low_rank.add(y, x, linear, noise, _LOW_RANK_SITES + site, which)
