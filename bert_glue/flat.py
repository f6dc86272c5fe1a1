"""Parameters and gradients as views of flat buffers.

One buffer each for decayed and undecayed parameters: the norm, the clip, the update, the all-reduce and
the copy of masters are then one operation over contiguous memory instead of one a parameter. This is
the reference's `--use_combine_grad`, for every optimizer that works element by element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from bert_glue.linear import Linear

# Elements: every buffer begins where a device's widest loads may begin.
_ALIGNED = 64
_UNDECAYED = ("bias", "norm.weight", "LayerNorm.weight", "layer_norm.weight")

# Factor of the learning rate by parameter name; None: 1 for all.
Rates = Mapping[str, float] | None


@dataclass
class NamedGroup:
    """Parameters that share a weight decay and a dtype.

    Args:
        names: of the parameters.
        parameters: themselves.
        is_decayed: whether weight decay applies.
        rate: factor of the learning rate.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    is_decayed: bool
    rate: float = field(default=1.0, kw_only=True)

    @property
    def shapes(self) -> list[torch.Size]:
        """Of the parameters."""
        return [p.shape for p in self.parameters]


@dataclass
class FlatGroup(NamedGroup):
    """A group whose parameters lie in one buffer, in their order.

    Args:
        data: `[elements]`, the parameters are views of it.
        grad: `[elements]`, their gradients are views of it.
    """

    data: torch.Tensor
    grad: torch.Tensor

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Slices of a buffer laid out as this group, by parameter name."""
        pieces = buffer.split([shape.numel() for shape in self.shapes])
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}


def is_decayed(name: str) -> bool:
    """True if weight decay applies to a parameter of this name: not to biases and norms."""
    return not name.lower().endswith(tuple(ending.lower() for ending in _UNDECAYED))


def named_groups(module: nn.Module, rates: Rates = None) -> list[NamedGroup]:
    """A module's trainable parameters, the decayed ones first; one used under two names comes once.

    Args:
        rates: factor of the learning rate by parameter name; None: 1 for all.
    """
    groups: dict[tuple[bool, torch.dtype, float], NamedGroup] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed, rate = is_decayed(name), rates[name] if rates else 1.0
            group = groups.setdefault((decayed, parameter.dtype, rate), NamedGroup([], [], decayed, rate=rate))
            group.names.append(name)
            group.parameters.append(parameter)
    return sorted(groups.values(), key=lambda group: not group.is_decayed)


def side_by_side(buffers: list[torch.Tensor], is_joint: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Zeros as large as some flat buffers, in one allocation a dtype: one operation then reaches all.

    Args:
        is_joint: False gives each an allocation of its own, for optimizers that move allocations.

    Returns:
        The zeros, `[elements]` each; and the allocations that hold them, whose last one ends with two elements
        that belong to none.
    """
    device = buffers[0].device
    if not is_joint:
        alone = [torch.zeros_like(buffer) for buffer in buffers]
        return alone, [*alone, torch.zeros(2, device=device)]
    found, joint = {}, []
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
        same = [at for at, buffer in enumerate(buffers) if buffer.dtype == dtype]
        sizes = [-(-buffers[at].numel() // _ALIGNED) * _ALIGNED for at in same]
        joint.append(torch.zeros(sum(sizes) + 2, dtype=dtype, device=device))
        for at, piece in zip(same, joint[-1][:-2].split(sizes), strict=True):
            found[at] = piece[: buffers[at].numel()]
    return [found[at] for at in range(len(buffers))], joint


def flatten(
    module: nn.Module, is_joint: bool = True, rates: Rates = None
) -> tuple[list[FlatGroup], list[torch.Tensor]]:
    """Move a module's trainable parameters into flat buffers, in place, and give them gradient views.

    All must be on one device; parameters of another dtype (BatchNorm at O2) are groups of their own.

    Returns:
        The groups; and the allocations of their gradients, see `side_by_side`.
    """
    flat, groups = [], named_groups(module, rates)
    buffers = [torch.cat([p.data.flatten() for p in group.parameters]) for group in groups]
    grads, allocations = side_by_side(buffers, is_joint)
    for group, data, grad in zip(groups, buffers, grads, strict=True):
        flat.append(FlatGroup(group.names, group.parameters, group.is_decayed, data, grad, rate=group.rate))
        data_views, grad_views = flat[-1].views(data), flat[-1].views(grad)
        for name, parameter in zip(group.names, group.parameters, strict=True):
            parameter.data, parameter.grad = data_views[name], grad_views[name]
    for part in module.modules():
        if isinstance(part, Linear):
            part.adds_into_grad = True
    return flat, allocations
