"""A stand-in for a device's recordings, on the CPU: operators taken down once, with their numbers and their memory.

Like a CUDA graph it does nothing while it records, replays without any Python of the program, reads and writes the
memory of the recording, and refuses to give a number to the host.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bert_glue.devices.device import Device
from bert_glue.model import attention
from bert_glue.training import cuda_graphs


class Tape:
    """In place of `graphs.Recorder`."""

    def __init__(self, device=None):
        self.recorded = self.eager = 0

    def beside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """As it comes."""
        self.eager += 1
        return work()

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Take down the operators of `work`; what they changed is put back."""
        self.recorded += 1
        generator = torch.get_rng_state()
        with _Operators() as tape:
            result = work()
        with torch.no_grad():
            for changed, before in reversed(tape.before.values()):  # a part may have been changed before its whole
                changed.copy_(before)
        torch.set_rng_state(generator)
        return lambda: (tape.replay(), result)[1]

    def random_state(self) -> torch.Tensor:
        """Of the host."""
        return torch.get_rng_state()

    def set_random_state(self, state: torch.Tensor) -> None:
        """Of the host."""
        torch.set_rng_state(state)


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Make the CPU attend as CUDA does, by borders on the device, and record on tapes."""
    attention.cuda_kernel.cache_clear()
    patch.setitem(attention.ATTENTION, "cpu", attention.varlen_attention)
    patch.setattr(attention, "CUDA_KERNELS", {"stand-in": (batched_kernel, True)})
    patch.setattr(cuda_graphs, "Recorder", Tape)
    patch.setattr(Device, "can_record", True)


def batched_kernel(query, key, value, q_cu_seqlens, k_cu_seqlens, q_longest, k_longest, drop):
    """Variable lengths by borders that stay tensors: all pairs, those of two sequences masked."""
    q_owner = torch.searchsorted(q_cu_seqlens, torch.arange(len(query), dtype=torch.int32), right=True)
    k_owner = torch.searchsorted(k_cu_seqlens, torch.arange(len(key), dtype=torch.int32), right=True)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(q_owner[:, None] != k_owner[None, :], torch.finfo(query.dtype).min)
    return torch.einsum("hqk,khd->qhd", F.dropout(scores.softmax(-1), drop), value)


def _tensors(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.taken: list[tuple] = []
        self.before: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._own: set[int] = set()  # memory of the recording itself

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: compiled code runs here too, operator by operator; torch would refuse to run it below a mode."""
        return True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert operator is not torch.ops.aten._local_scalar_dense.default, "the host waits for a number"
        if operator._schema.is_mutable:
            for argument, value in zip(operator._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in _tensors(value):
                        self._keep(tensor)
        result = operator(*args, **kwargs)
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        self._own |= {t.untyped_storage().data_ptr() for t in _tensors(result)} - given
        self.taken.append((operator, args, kwargs, result))
        return result

    def _keep(self, tensor: torch.Tensor) -> None:
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.untyped_storage().data_ptr() not in self._own and place not in self.before:
            self.before[place] = (tensor, tensor.detach().clone())

    @torch.no_grad()
    def replay(self) -> None:
        """Do it again, into the same memory."""
        for operator, args, kwargs, result in self.taken:
            for place, value in zip(_tensors(result), _tensors(operator(*args, **kwargs)), strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)
