"""Linear layers whose weight gradient goes into the flat buffer, LoRA beside them, and dropout by counted masks.

autograd would put the product into a new tensor and then add it to `.grad`: two more passes over memory
for every weight, and fresh pages for every temporary. With flat views (precision/flat_buffers.py) the product
accumulates where it belongs.

On a CPU with AVX-512 the products, forward and backward, are oneDNN's. torch's own are MKL's there, which leaves half
of the vector width unused on AMD processors: 110 GFLOP/s a core where oneDNN gets 230.

torch's CPU dropout draws one Bernoulli number after another on one thread, about 12 ns each on the
machines we measured: as much as the matrix product beside it. Here 16-bit draws of numpy's SFC64
are compared with a threshold, 8 to 10 times faster. A mask is a function of its address and not of
what was drawn before, so that a resumed run, and the second forward of gradient checkpointing, see
the same masks. Other devices use their own kernels.

Where a product computes several layers of transformers at once (query, key and value), their adapters are
one product down and one up as well, the latter with a block for each adapted layer. Merging the weight
in every step would bring back the full weight gradient, half of the backward pass that LoRA saves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bert_glue.devices.device import has_onednn_linear, has_slow_products

_TERM = re.compile(r"(.+)\.lora_([AB])\.weight")


def plain_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as they are without peft's wrappers; adapters as peft writes them to files."""
    return {
        name.replace(".base_layer.", ".").replace(".default.weight", ".weight"): tensor
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class Adapter:
    """LoRA as it was added to a model.

    Args:
        config: peft's LoraConfig.
        layers: names of the adapted layers in transformers.
    """

    config: Any
    layers: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """Factor of the low-rank term."""
        return self.config.lora_alpha / self.config.r

    @property
    def settings(self) -> dict[str, object]:
        """What must not differ on resume, besides shapes."""
        return {
            "lora_alpha": self.config.lora_alpha,
            "lora_dropout": self.config.lora_dropout,
            "adapted_layers": list(self.layers),
        }

    def merged(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A plain model of the same function: each adapted weight with its term added."""
        plain = {name: value for name, value in tensors.items() if not _TERM.fullmatch(name)}
        for layer in self.layers:
            up, down = (tensors[f"{layer}.lora_{kind}.weight"].float() for kind in "BA")
            weight = plain[f"{layer}.weight"]
            plain[f"{layer}.weight"] = (weight.float() + self.scaling * (up @ down)).to(weight.dtype)
        return plain

    def save(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` reads.

        Args:
            tensors: as of `LoadedModel.tensors`.
        """
        from safetensors.torch import save_file

        whole = re.compile(rf"(.*\.)?({'|'.join(self.config.modules_to_save)})\..+")
        kept = {f"base_model.model.{n}": t for n, t in tensors.items() if _TERM.fullmatch(n) or whole.fullmatch(n)}
        save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


_LOW_RANK_MASK_IDS = 1 << 20  # above every address of a dropout in the model itself
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
        # oneDNN's product cannot add to its output: one more pass over the weight's gradient, which it earns back.
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
        ctx.parameters = (weight, bias)
        ctx.which = which
        return multiply(x, weight[which], bias[which])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        leaf_weight, leaf_bias = ctx.parameters
        # The product ends in the flat gradient buffer. Returned to autograd, it would be written to fresh memory and
        # read again to be added: for a weight of n bytes 4n instead of 2n are moved, and n of them are new pages.
        _add_product(leaf_weight.grad[ctx.which], grad.t(), x)
        leaf_bias.grad[ctx.which].add_(grad.sum(0))
        grad_x = multiply(grad, weight[ctx.which].t()) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


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

    With `low_rank` set, its term is added; `dropout_masks` and `mask_id` are for that term's dropout.
    """

    adds_into_grad = False  # set where gradients are flat views of the parameters' own dtype

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.low_rank: LowRank | None = None

    def forward(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None, mask_id: int = 0) -> torch.Tensor:
        """All of the outputs."""
        return self.rows(x, slice(None), dropout_masks, mask_id)

    def rows(self, x: torch.Tensor, which: slice, dropout_masks: DropoutMasks | None, mask_id: int) -> torch.Tensor:
        """Some of the outputs: `[rows, in_features] -> [rows, which]`.

        Into `.grad` where that is a flat view and no cast is in between; plain autograd otherwise.
        """
        if self._adds_into_grad(x):
            return _LinearIntoGrad.apply(x, self.weight, self.bias, which)
        y = linear(x, self.weight[which], self.bias[which])
        if self.low_rank is None:
            return y
        return self.low_rank.add(y, x, linear, dropout_masks, _LOW_RANK_MASK_IDS + mask_id, which)

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


_LEVELS = 1 << 16


def _draw(address: torch.Tensor, shape: Sequence[int], drop: float, mask_id: int) -> torch.Tensor:
    seed, rank, step, *branch = address.tolist()
    count = int(np.prod(shape))
    bits = np.random.SFC64([seed, rank, step, mask_id, *branch]).random_raw(-(-count // 4))
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
_draw_in_graph.register_fake(lambda address, shape, drop, mask_id: torch.empty(shape, dtype=torch.bool))


class DropoutMasks:
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

    def keep(self, shape: tuple[int, ...], drop: float, mask_id: int) -> torch.Tensor:
        """Mask of `shape`, bool, True with probability `1 - drop` to the nearest 1/65536.

        Args:
            drop: probability in [0, 1).
            mask_id: of the dropout within the model.
        """
        draw = _draw_in_graph if torch.compiler.is_compiling() else _draw
        return draw(self._address, shape, drop, mask_id)


def as_numbers(keep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as 1 and 0; torch converts bytes 7 times as fast as bools, inductor bools faster than bytes."""
    return keep.to(dtype) if torch.compiler.is_compiling() else keep.view(torch.uint8).to(dtype)


class _CpuDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keep, scale, residual):
        ctx.scale = scale
        ctx.has_residual = residual is not None
        ctx.save_for_backward(keep)  # a byte an element, where autograd would keep the scaled mask in x's dtype
        kept = as_numbers(keep, x.dtype)
        if residual is None:
            return kept.mul_(x).mul_(scale)
        return torch.addcmul(residual, x, kept, value=scale)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return as_numbers(keep, grad.dtype).mul_(grad).mul_(ctx.scale), None, None, grad if ctx.has_residual else None


def dropout(
    x: torch.Tensor, drop: float, dropout_masks: DropoutMasks | None, mask_id: int, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`residual + dropout(x)`, any shape; no dropout where `dropout_masks` is None or `drop` is 0.

    Args:
        drop: probability in [0, 1].
        dropout_masks: of this rank, None in evaluation.
        mask_id: of this dropout within the model.
    """
    if dropout_masks is None or drop == 0.0:
        return x if residual is None else x + residual
    if x.is_cpu and drop < 1.0:
        keep = dropout_masks.keep(tuple(x.shape), drop, mask_id)
        return _CpuDropout.apply(x, keep, 1.0 / (1.0 - drop), residual)
    dropped = F.dropout(x, drop, training=True)
    return dropped if residual is None else dropped + residual


class LowRank(nn.Module):
    """Adapters of one product.

    Args:
        inputs, outputs: sizes of the product.
        rank: of each adapter.
        scaling: alpha / rank.
        drop: dropout before `down`, in [0, 1); the adapters of one product share its mask.
        parts: which of the product's layers are adapted, ascending.
        count: layers that the product computes.
    """

    def __init__(
        self, inputs: int, outputs: int, rank: int, scaling: float, drop: float, parts: tuple[int, ...], count: int
    ):
        super().__init__()
        self.rank = rank
        self.scaling = scaling
        self.drop = drop
        self.parts = parts
        self.count = count
        # peft's start: the adapted layer computes what it did.
        self.down = nn.Parameter(torch.empty(len(parts) * rank, inputs))
        for piece in self.down.data.chunk(len(parts)):
            nn.init.kaiming_uniform_(piece, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(len(parts) * outputs // count, rank))

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        product: Callable[..., torch.Tensor],
        dropout_masks: DropoutMasks | None,
        mask_id: int,
        rows: slice = slice(None),
    ) -> torch.Tensor:
        """`y` with the low-rank term of `x`: `[tokens, in] -> [tokens, out]`.

        Args:
            y: `[tokens, out]`, output of the frozen product, or of some of its outputs.
            product: of `[rows, in]` and `[out, in]`.
            dropout_masks: None turns dropout off.
            mask_id: of the dropout.
            rows: which outputs of the whole product `y` holds.
        """
        inner = product(dropout(x, self.drop, dropout_masks, mask_id), self.down) * self.scaling
        return y + product(inner, self._blocks()[rows])

    def _blocks(self) -> torch.Tensor:
        """`up` as one matrix `[out, adapters * rank]`: each adapter's rows read its own columns only."""
        blocks = self.up.chunk(len(self.parts))
        if self.count == 1:
            return self.up
        width, rows = len(self.parts) * self.rank, len(blocks[0])
        padded = {
            part: F.pad(block, (at * self.rank, width - (at + 1) * self.rank))
            for at, (part, block) in enumerate(zip(self.parts, blocks, strict=True))
        }
        nothing = self.up.new_zeros(rows, width)
        return torch.cat([padded.get(part, nothing) for part in range(self.count)])
