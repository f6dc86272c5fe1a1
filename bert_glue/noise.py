"""Dropout whose masks depend only on (seed, rank, step, site): repeatable, and cheap on a CPU.

torch's CPU dropout draws one Bernoulli number after another on one thread, about 12 ns each on the
machines we measured: as much as the matrix product beside it. Here 16-bit draws of numpy's SFC64
are compared with a threshold, 8 to 10 times faster. A mask is a function of its address and not of
what was drawn before, so that a resumed run, and the second forward of gradient checkpointing, see
the same masks. Other devices use their own kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

_LEVELS = 1 << 16


def _draw(address: torch.Tensor, shape: Sequence[int], drop: float, site: int) -> torch.Tensor:
    seed, rank, step, *branch = address.tolist()
    count = int(np.prod(shape))
    bits = np.random.SFC64([seed, rank, step, site, *branch]).random_raw(-(-count // 4))
    # The last level stays: int16 cannot hold one threshold more. numpy compares 7 times as fast as torch.
    threshold = min(round(drop * _LEVELS), _LEVELS - 1) - _LEVELS // 2
    return torch.from_numpy(bits.view(np.int16)[:count] >= threshold).view(shape)


# The same inside a compiled graph, which calls it: the same masks there as everywhere.
_draw_in_graph = torch.library.custom_op(
    "bert_glue::keep",
    _draw,
    mutates_args=(),
    schema="(Tensor address, SymInt[] shape, float drop, SymInt site) -> Tensor",
)
_draw_in_graph.register_fake(lambda address, shape, drop, site: torch.empty(shape, dtype=torch.bool))


class Noise:
    """Source of keep-masks of one rank.

    Args:
        seed: run seed, >= 0.
        rank: rank of this process, >= 0; ranks draw different masks.
        branch: of several forward passes over one batch, >= 0; they draw different masks.
    """

    def __init__(self, seed: int, rank: int = 0, branch: int = 0):
        # A tensor, which a compiled graph takes as an input: a number would be a part of it, new in every step.
        self._address = torch.tensor([seed, rank, 0, *([branch] if branch else [])])

    def begin(self, step: int) -> None:
        """Say which forward of the run comes next (micro-batches counted from 0)."""
        self._address[2] = step

    def keep(self, shape: tuple[int, ...], drop: float, site: int) -> torch.Tensor:
        """Mask of `shape`, bool, True with probability `1 - drop` to the nearest 1/65536.

        Args:
            drop: probability in [0, 1).
            site: address of the dropout within the model.
        """
        draw = _draw_in_graph if torch.compiler.is_compiling() else _draw
        return draw(self._address, shape, drop, site)


def as_numbers(keep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as 1 and 0; torch converts bytes 7 times as fast as bools, inductor bools faster than bytes."""
    return keep.to(dtype) if torch.compiler.is_compiling() else keep.view(torch.uint8).to(dtype)


class _CpuDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keep, scale, residual):
        ctx.scale = scale
        ctx.has_residual = residual is not None
        ctx.save_for_backward(keep)
        kept = as_numbers(keep, x.dtype)
        if residual is None:
            return kept.mul_(x).mul_(scale)
        return torch.addcmul(residual, x, kept, value=scale)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return as_numbers(keep, grad.dtype).mul_(grad).mul_(ctx.scale), None, None, grad if ctx.has_residual else None


def dropout(
    x: torch.Tensor, drop: float, noise: Noise | None, site: int, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`residual + dropout(x)`, any shape; the identity where `noise` is None or `drop` is 0.

    Args:
        drop: probability in [0, 1].
        noise: masks of this rank, None in evaluation.
        site: address of this dropout within the model.
    """
    if noise is None or drop == 0.0:
        return x if residual is None else x + residual
    if x.is_cpu and drop < 1.0:
        keep = noise.keep(tuple(x.shape), drop, site)
        return _CpuDropout.apply(x, keep, 1.0 / (1.0 - drop), residual)
    dropped = F.dropout(x, drop, training=True)
    return dropped if residual is None else dropped + residual
