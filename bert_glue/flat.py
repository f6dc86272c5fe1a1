"""Parameters and gradients as views of flat buffers.

One buffer each for decayed and undecayed parameters: the norm, the clip, the update, the all-reduce and
the copy of masters are then one operation over contiguous memory instead of one a parameter. This is
the reference's `--use_combine_grad`, for every optimizer that works element by element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bert_glue.linear import Linear

_UNDECAYED = ("bias", "norm.weight", "LayerNorm.weight", "layer_norm.weight")


@dataclass
class NamedGroup:
    """Parameters that share a weight decay and a dtype.

    Args:
        names: of the parameters.
        parameters: themselves.
        is_decayed: whether weight decay applies.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    is_decayed: bool

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


def named_groups(module: nn.Module) -> list[NamedGroup]:
    """A module's trainable parameters, the decayed ones first; one used under two names comes once."""
    groups: dict[tuple[bool, torch.dtype], NamedGroup] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed = is_decayed(name)
            group = groups.setdefault((decayed, parameter.dtype), NamedGroup([], [], decayed))
            group.names.append(name)
            group.parameters.append(parameter)
    return sorted(groups.values(), key=lambda group: not group.is_decayed)


def flatten(module: nn.Module) -> list[FlatGroup]:
    """Move a module's trainable parameters into flat buffers, in place, and give them gradient views.

    All must be on one device; parameters of another dtype (BatchNorm at O2) are groups of their own.
    """
    flat = []
    for group in named_groups(module):
        data = torch.cat([p.data.flatten() for p in group.parameters])
        flat.append(FlatGroup(group.names, group.parameters, group.is_decayed, data, torch.zeros_like(data)))
        data_views, grad_views = flat[-1].views(flat[-1].data), flat[-1].views(flat[-1].grad)
        for name, parameter in zip(group.names, group.parameters, strict=True):
            parameter.data, parameter.grad = data_views[name], grad_views[name]
    for part in module.modules():
        if isinstance(part, Linear):
            part.adds_into_grad = True
    return flat
