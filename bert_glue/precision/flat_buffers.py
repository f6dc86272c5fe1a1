"""Parameters and gradients as views of flat buffers.

Decayed and undecayed parameters have one buffer each. The norm, the clip, the update, the all_reduce and the copy of
masters are then one operation over contiguous memory each, instead of one operation a parameter. This is the
reference's `--use_combine_grad`, for every optimizer that works element by element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from bert_glue.devices.distributed import DistributedContext

# Every buffer begins at a multiple of so many elements, where a device's widest loads may begin. At most 63 elements of
# padding a group are the price.
_ALIGNED = 64
# Elements in one fp32 sum of squares. A longer sum loses the small squares; a shorter one makes more partial norms.
_NORM_CHUNK = 1 << 10
_UNDECAYED = ("bias", "norm.weight", "LayerNorm.weight", "layer_norm.weight")

# Factor of the learning rate by parameter name; None means 1 for all.
Rates = Mapping[str, float] | None


@dataclass
class NamedGroup:
    """Parameters that share a weight decay and a dtype.

    Args:
        names: names of the parameters.
        parameters: the parameters, in the order of `names`.
        is_decayed: whether weight decay applies.
        rate: factor of the learning rate, in (0, 1].
    """

    names: list[str]
    parameters: list[nn.Parameter]
    is_decayed: bool
    rate: float = field(default=1.0, kw_only=True)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the parameters, in their order."""
        return [p.shape for p in self.parameters]


@dataclass
class FlatGroup(NamedGroup):
    """A group whose parameters lie in one buffer, in their order.

    Args:
        data: `[elements]`; the parameters are views of it.
        grad: `[elements]`; the gradients of the parameters are views of it.
    """

    data: torch.Tensor
    grad: torch.Tensor

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Slices by parameter name of a buffer `[elements]` with the layout of this group."""
        pieces = buffer.split([shape.numel() for shape in self.shapes])
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}


def is_decayed(name: str) -> bool:
    """True if weight decay applies to a parameter of this name; it does not apply to biases and norms."""
    return not name.lower().endswith(tuple(ending.lower() for ending in _UNDECAYED))


def named_groups(module: nn.Module, rates: Rates = None) -> list[NamedGroup]:
    """A module's trainable parameters, the decayed ones first. A parameter with two names appears once.

    Args:
        rates: factor of the learning rate by parameter name; None means 1 for all.
    """
    groups: dict[tuple[bool, torch.dtype, float], NamedGroup] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed = is_decayed(name)
            rate = rates[name] if rates else 1.0
            group = groups.setdefault((decayed, parameter.dtype, rate), NamedGroup([], [], decayed, rate=rate))
            group.names.append(name)
            group.parameters.append(parameter)
    return sorted(groups.values(), key=lambda group: not group.is_decayed)


class GradientBuffers:
    """Flat gradients side by side in one allocation a dtype, and two slots that the ranks add up with them.

    One operation reaches all gradients. The slots lie at the end of the last allocation, so that the all_reduce of the
    gradients carries them. A collective of their own would cost every rank its full latency for a single number.

    Args:
        like: flat buffers `[elements]`; each gets zeros of its size, dtype and device.
        is_joint: False gives each gradient and the slots an allocation of their own, for optimizers that move
            allocations.
        device: device of the slots where `like` is empty and the slots are all there is.

    Attributes:
        allocations: the memory of gradients and slots; each is one all_reduce.
        gradients: `[elements]` each, in the order of `like`.
        overflow: number of ranks with an overflow that the gradients do not show, 0-d.
        stop_votes: number of ranks that a signal asks to stop, `[1]`.
    """

    _SLOTS = 2

    def __init__(self, like: list[torch.Tensor], is_joint: bool = True, device: torch.device | None = None):
        if is_joint and like:
            self.gradients, self.allocations = self._joint(like)
            slots = self.allocations[-1][-self._SLOTS :]
        else:
            self.gradients = [torch.zeros_like(buffer) for buffer in like]
            slots = torch.zeros(self._SLOTS, device=like[0].device if like else device)
            self.allocations = [*self.gradients, slots]
        # Both are views into what is summed: a number written here is on all ranks after the step's own all_reduce.
        self.overflow = slots[0]
        self.stop_votes = slots[1:]

    def _joint(self, like: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The gradients in the order of `like`, and the allocations; the last one has the slots at its end."""
        gradients: dict[int, torch.Tensor] = {}
        allocations = []
        dtypes = list(dict.fromkeys(buffer.dtype for buffer in like))
        # One all_reduce a dtype. BERT has one dtype at every level; only BatchNorm at O2 makes a second.
        for dtype in dtypes:
            members = [at for at, buffer in enumerate(like) if buffer.dtype == dtype]
            sizes = [-(-like[at].numel() // _ALIGNED) * _ALIGNED for at in members]
            slots = self._SLOTS if dtype == dtypes[-1] else 0
            allocations.append(torch.zeros(sum(sizes) + slots, dtype=dtype, device=like[0].device))
            pieces = allocations[-1][: sum(sizes)].split(sizes)
            for at, piece in zip(members, pieces, strict=True):
                gradients[at] = piece[: like[at].numel()]
        return [gradients[at] for at in range(len(like))], allocations

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Dtypes of the allocations; each allocation is one all_reduce."""
        return [allocation.dtype for allocation in self.allocations]

    @property
    def bytes(self) -> int:
        """Bytes that one rank sums with the others in a step."""
        return sum(allocation.numel() * allocation.element_size() for allocation in self.allocations)

    def zero(self) -> None:
        """Clear gradients and slots, in place."""
        # NPU fused optimizers keep the addresses of the views, so that no gradient may become None or a new tensor.
        # This costs one write of the whole buffer a step.
        for allocation in self.allocations:
            allocation.zero_()

    def all_reduce(self, ranks: DistributedContext) -> None:
        """Add gradients and slots over all ranks, in place."""
        ranks.all_reduce(self.allocations)


def l2_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all elements of some fp32 tensors, 0-d; its relative error is below 1e-6 at any size.

    On a CPU `Tensor.norm` adds the squares in a few fp32 lanes. Soon each new square lies below the last bit of its
    sum: the norm is 1 % too low for 93 M elements and 5 % too low for 315 M. This function sums each chunk by itself,
    and then the chunks' norms in the same way. It reads the memory once, as `Tensor.norm` does, and takes 23 ms instead
    of 32 ms for 93 M elements on one core.
    """
    norms = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() // _NORM_CHUNK * _NORM_CHUNK
        if whole:
            norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_CHUNK), dim=1))
        if whole < flat.numel():
            norms.append(torch.linalg.vector_norm(flat[whole:]).view(1))
    if not norms:
        return torch.zeros(())
    joined = torch.cat(norms)  # 1/1024 of the elements, so that the second round costs next to nothing
    return torch.linalg.vector_norm(joined) if len(joined) <= _NORM_CHUNK else l2_norm([joined])


def flatten(module: nn.Module, is_joint: bool = True, rates: Rates = None) -> tuple[list[FlatGroup], GradientBuffers]:
    """Move a module's trainable parameters into flat buffers, in place, and give them gradient views.

    All parameters must be on one device. Parameters of another dtype (BatchNorm at O2) form groups of their own. The
    function sets the attribute `adds_into_grad` of every part that has one: the part's backward may then write to the
    views itself.

    Returns:
        The groups, and the buffers of their gradients.
    """
    flat, groups = [], named_groups(module, rates)
    # The weights are in memory twice for a moment: each old one is freed when its parameter becomes a view.
    buffers = [torch.cat([p.data.flatten() for p in group.parameters]) for group in groups]
    gradients = GradientBuffers(buffers, is_joint)
    for group, data, grad in zip(groups, buffers, gradients.gradients, strict=True):
        flat.append(FlatGroup(group.names, group.parameters, group.is_decayed, data, grad, rate=group.rate))
        data_views, grad_views = flat[-1].views(data), flat[-1].views(grad)
        for name, parameter in zip(group.names, group.parameters, strict=True):
            parameter.data = data_views[name]
            parameter.grad = grad_views[name]  # set once: autograd adds to an existing gradient in place
    for part in module.modules():
        if hasattr(part, "adds_into_grad"):
            part.adds_into_grad = True
    return flat, gradients
