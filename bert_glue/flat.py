"""Parameters and gradients as views of flat buffers.

One buffer each for decayed and undecayed parameters: the norm, the clip, the update, the all-reduce and
the copy of masters are then one operation over contiguous memory instead of one a parameter. This is
the reference's `--use_combine_grad`, for every optimizer that works element by element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

_UNDECAYED = ("bias", "norm.weight", "LayerNorm.weight", "layer_norm.weight")


@dataclass
class FlatGroup:
    """Parameters that share a weight decay.

    Args:
        names: of the parameters, in the order of the buffer.
        shapes: theirs.
        data: `[elements]`, the parameters are views of it.
        grad: `[elements]`, their gradients are views of it.
        is_decayed: whether weight decay applies.
    """

    names: list[str]
    shapes: list[torch.Size]
    data: torch.Tensor
    grad: torch.Tensor
    is_decayed: bool

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Slices of a buffer laid out as this group, by parameter name."""
        pieces = buffer.split([shape.numel() for shape in self.shapes])
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}


def flatten(module: nn.Module) -> list[FlatGroup]:
    """Move a module's trainable parameters into flat buffers, in place, and give them gradient views.

    A parameter used under two names is stored once. All must have one dtype and one device.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = []
    for is_decayed in (True, False):
        members = [(n, p) for n, p in named if n.lower().endswith(tuple(u.lower() for u in _UNDECAYED)) != is_decayed]
        if not members:
            continue
        total = sum(p.numel() for _, p in members)
        data = torch.empty(total, dtype=members[0][1].dtype, device=members[0][1].device)
        group = FlatGroup(
            [n for n, _ in members], [p.shape for _, p in members], data, torch.zeros_like(data), is_decayed
        )
        grads = group.views(group.grad)
        for (name, parameter), view in zip(members, group.views(data).values(), strict=True):
            view.copy_(parameter.data)
            parameter.data, parameter.grad = view, grads[name]
        groups.append(group)
    return groups
