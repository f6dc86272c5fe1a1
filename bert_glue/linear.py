"""A linear layer whose weight gradient goes straight into the flat gradient buffer.

autograd would put the product into a new tensor and then add it to `.grad`: two more passes over memory
for every weight, and fresh pages for every temporary. With `.grad` present (flat views, see optim.py)
the product accumulates where it belongs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


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


class Linear(nn.Linear):
    """`[rows, in_features] -> [rows, out_features]`, as `nn.Linear`, always with a bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Into `.grad` where it is present and of the same dtype; plain autograd otherwise."""
        if (
            self.weight.grad is None
            or self.bias.grad is None
            or not torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
        ):
            return F.linear(x, self.weight, self.bias)
        return _LinearIntoGrad.apply(x, self.weight, self.bias)
