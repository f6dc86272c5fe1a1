"""Linear layers that add their weight gradient to the flat buffer, LoRA adapters, and dropout with counter-based masks.

autograd puts a weight's gradient into a new tensor and then adds it to `.grad`. This costs two more passes over memory
for every weight, and fresh pages for every temporary. With flat views (precision/flat_buffers.py) the product is added
directly to `.grad`.

On a CPU with AVX-512, other than Intel's, oneDNN computes the products, forward and backward. torch would use MKL. It
leaves half of the vector width unused on AMD processors: it reaches 110 GFLOP/s a core, and oneDNN 230.

torch's CPU dropout draws one Bernoulli number after another on one thread. Each takes about 12 ns on the machines we
measured, in total as long as the matrix product beside it. Here 16-bit draws of numpy's SFC64 are compared with a
threshold, which is 8 to 10 times faster. A mask is a function of its address and not of earlier draws, so that a
resumed run and the second forward pass of gradient checkpointing draw the same masks. Other devices use their own
kernels.

Where one product computes several layers of transformers (query, key and value), their adapters are also one product
down and one product up, with a block for each adapted layer. Merging the weight in every step instead would need the
full weight gradient again, which is the half of the backward pass that LoRA saves.
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
    """The tensors under their names without peft's wrappers; adapters under the names in peft's files."""
    return {
        name.replace(".base_layer.", ".").replace(".default.weight", ".weight"): tensor
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapters of a model.

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
        """The settings, besides shapes, that must be equal in a resumed run."""
        return {
            "lora_alpha": self.config.lora_alpha,
            "lora_dropout": self.config.lora_dropout,
            "adapted_layers": list(self.layers),
        }

    def merged(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a plain model with the same function: each adapted weight has its low-rank term added."""
        plain = {name: value for name, value in tensors.items() if not _TERM.fullmatch(name)}
        for layer in self.layers:
            up, down = (tensors[f"{layer}.lora_{kind}.weight"].float() for kind in "BA")
            weight = plain[f"{layer}.weight"]
            plain[f"{layer}.weight"] = (weight.float() + self.scaling * (up @ down)).to(weight.dtype)
        return plain

    def save(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` reads.

        Args:
            tensors: result of `LoadedModel.tensors`.
        """
        from safetensors.torch import save_file

        whole = re.compile(rf"(.*\.)?({'|'.join(self.config.modules_to_save)})\..+")
        kept = {f"base_model.model.{n}": t for n, t in tensors.items() if _TERM.fullmatch(n) or whole.fullmatch(n)}
        save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


_LOW_RANK_MASK_IDS = 1 << 20  # above the id of every dropout in the model itself
# Multiply-adds. oneDNN compiles a kernel for every number of rows, in half a millisecond: too much for a small product.
_LEAST_FOR_ONEDNN, _ROWS_OF_A_GRAPH = 1 << 26, 512


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    # A compiled graph serves all numbers of rows, which are buckets that recur: there the weight alone decides.
    rows = _ROWS_OF_A_GRAPH if torch.compiler.is_compiling() else len(x)
    return (
        x.dtype == weight.dtype == torch.float32
        and rows * weight.numel() >= _LEAST_FOR_ONEDNN
        and has_onednn_linear(x.device.type, not weight.is_contiguous())
    )


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # The operator that inductor calls (torch 2.13).
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# A name of our own for compiled graphs: inductor assumes constant weights behind torch's name.
_onednn_in_graph = torch.library.custom_op(
    "bert_glue::product", _onednn, mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
_onednn_in_graph.register_fake(lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`[rows, in] -> [rows, out]`, as `F.linear`, but without gradients."""
    # Size decides and not a stopwatch, because a resumed run must compute the same bits.
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    return (_onednn_in_graph if torch.compiler.is_compiling() else _onednn)(x, weight, bias)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total += a @ b`."""
    if _is_for_onednn(a, b.t()):
        # oneDNN's product cannot add to its output. The sum costs one more pass over the weight's gradient, which is
        # less than the faster product saves.
        total.add_(_onednn(a, b.t(), None))
    else:
        total.addmm_(a, b)


def _part(tensor: torch.Tensor | None, which: slice | None) -> torch.Tensor | None:
    # A slice of all rows would cost its backward a gradient filled with zeros and a copy, a hundred times a step at O1.
    return tensor if which is None or tensor is None else tensor[which]


class _Linear(torch.autograd.Function):
    """A linear layer that returns the gradients of weight and bias to autograd."""

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
    """A linear layer over some outputs that adds the gradients of weight and bias to the parameters' `.grad`."""

    @staticmethod
    def forward(ctx, x, weight, bias, which):
        ctx.save_for_backward(x, weight)
        ctx.parameters, ctx.which = (weight, bias), which
        return multiply(x, _part(weight, which), _part(bias, which))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        leaf_weight, leaf_bias = ctx.parameters
        # The product goes directly into the flat gradient buffer. autograd would write it to fresh memory and read it
        # again to add it. For a weight of n bytes that moves 4n bytes instead of 2n, n of them in new pages.
        _add_product(_part(leaf_weight.grad, ctx.which), grad.t(), x)
        if leaf_bias is not None:
            _part(leaf_bias.grad, ctx.which).add_(grad.sum(0))
        grad_x = multiply(grad, _part(weight, ctx.which).t()) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`[rows, in] -> [rows, out]`, as `F.linear`.

    Where a CPU has no products of a 16-bit dtype, they are computed in fp32 and rounded, as tensor cores do. The
    numbers are the same, and the speed is 10 times that of torch's own loops.
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
    """`[rows, in_features] -> [rows, out_features]`, as `nn.Linear`.

    If `low_rank` is set, its term is added. `dropout_masks` and `mask_id` belong to the dropout of that term.
    """

    adds_into_grad = False  # `flatten` sets it: `.grad` must be a view that stays where it is

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.low_rank: LowRank | None = None

    def forward(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None, mask_id: int = 0) -> torch.Tensor:
        """All outputs, `[rows, out_features]`."""
        return self.rows(x, None, dropout_masks, mask_id)

    def rows(
        self, x: torch.Tensor, which: slice | None, dropout_masks: DropoutMasks | None, mask_id: int
    ) -> torch.Tensor:
        """Some of the outputs, or with None all: `[rows, in_features] -> [rows, which]`.

        Gradients are added directly to `.grad` where it is a flat view and no cast lies between.
        """
        if self._adds_into_grad(x):
            return _LinearIntoGrad.apply(x, self.weight, self.bias, which)
        y = linear(x, _part(self.weight, which), _part(self.bias, which))
        if self.low_rank is None:
            return y
        return self.low_rank.add(y, x, linear, dropout_masks, _LOW_RANK_MASK_IDS + mask_id, which)

    def _adds_into_grad(self, x: torch.Tensor) -> bool:
        return not (
            torch.compiler.is_compiling()
            or not self.adds_into_grad
            or self.weight.grad is None
            or (self.bias is not None and self.bias.grad is None)
            or not torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or has_slow_products(x.device.type, x.dtype)
        )


_LEVELS = 1 << 16


def _draw(address: torch.Tensor, shape: Sequence[int], drop: float, mask_id: int) -> torch.Tensor:
    seed, rank, step, *branch = address.tolist()
    count = int(np.prod(shape))
    bits = np.random.SFC64([seed, rank, step, mask_id, *branch]).random_raw(-(-count // 4))
    # The threshold ends one level early, because int16 holds no more. numpy compares 7 times as fast as torch.
    threshold = min(round(drop * _LEVELS), _LEVELS - 1) - _LEVELS // 2
    return torch.from_numpy(bits.view(np.int16)[:count] >= threshold).view(shape)


# Compiled graphs call this operator and do not trace into it, so that they draw the masks of an eager run.
_draw_in_graph = torch.library.custom_op(
    "bert_glue::keep",
    _draw,
    mutates_args=(),
    schema="(Tensor address, SymInt[] shape, float drop, SymInt site) -> Tensor",
)
_draw_in_graph.register_fake(lambda address, shape, drop, mask_id: torch.empty(shape, dtype=torch.bool))


class DropoutMasks:
    """The dropout masks of one rank.

    Args:
        seed: run seed, >= 0.
        rank: rank of this process, >= 0; ranks draw different masks.
        branch: number of the forward pass over one batch, >= 0; the passes draw different masks.
    """

    def __init__(self, seed: int, rank: int = 0, branch: int = 0):
        # A tensor is an input of a compiled graph. A number would be a constant, and every step would compile again.
        self._address = torch.tensor([seed, rank, 0, *([branch] if branch else [])])

    def begin(self, step: int) -> None:
        """Set the number of the run's next forward pass (micro-batches counted from 0)."""
        self._address[2] = step

    def keep(self, shape: tuple[int, ...], drop: float, mask_id: int) -> torch.Tensor:
        """A bool mask of `shape`, True with probability `1 - drop`, rounded to 1/65536.

        Args:
            drop: probability in [0, 1).
            mask_id: number of the dropout within the model.
        """
        draw = _draw_in_graph if torch.compiler.is_compiling() else _draw
        return draw(self._address, shape, drop, mask_id)


def as_numbers(keep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as 1 and 0 in `dtype`, same shape."""
    # torch converts bytes 7 times as fast as bools; inductor converts bools faster.
    return keep.to(dtype) if torch.compiler.is_compiling() else keep.view(torch.uint8).to(dtype)


class _CpuDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keep, scale, residual):
        ctx.scale = scale
        ctx.has_residual = residual is not None
        ctx.save_for_backward(keep)  # one byte an element; autograd would keep the scaled mask in x's dtype
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
        dropout_masks: masks of this rank; None in evaluation.
        mask_id: number of this dropout within the model.
    """
    if dropout_masks is None or drop == 0.0:
        return x if residual is None else x + residual
    if x.is_cpu and drop < 1.0:
        keep = dropout_masks.keep(tuple(x.shape), drop, mask_id)
        return _CpuDropout.apply(x, keep, 1.0 / (1.0 - drop), residual)
    dropped = F.dropout(x, drop, training=True)
    return dropped if residual is None else dropped + residual


class LowRank(nn.Module):
    """The LoRA adapters of one product (Hu et al. 2021, arXiv 2106.09685).

    Args:
        inputs, outputs: sizes of the product.
        rank: rank of each adapter, >= 1.
        scaling: alpha / rank.
        drop: dropout before `down`, in [0, 1); the adapters of one product share its mask.
        parts: numbers of the adapted layers of the product, ascending.
        count: number of layers that the product computes.
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
        # The start of peft: `up` is zero, so that the adapted layer first computes what it did without an adapter.
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
        rows: slice | None = None,
    ) -> torch.Tensor:
        """`y` plus the low-rank term of `x`: `[tokens, in] -> [tokens, out]`.

        Args:
            y: `[tokens, out]`, all or some outputs of the frozen product.
            product: multiplies `[rows, in]` by the transpose of `[out, in]`.
            dropout_masks: None turns dropout off.
            mask_id: number of the dropout within the model.
            rows: the outputs of the whole product that `y` holds; None for all.
        """
        inner = product(dropout(x, self.drop, dropout_masks, mask_id), self.down) * self.scaling
        return y + product(inner, _part(self._blocks(), rows))

    def _blocks(self) -> torch.Tensor:
        """`up` as one matrix `[out, adapters * rank]`, in which the rows of an adapter are zero outside its columns."""
        # The zeros are multiplied too: `parts` times the work of the blocks, but one launch and one read of `inner`.
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
