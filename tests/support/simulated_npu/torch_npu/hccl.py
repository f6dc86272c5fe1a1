"""The backend "hccl": gloo on the host copies, for tensors of the device only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree


def _host(x):
    from torch_npu.tensor import NpuTensor

    if isinstance(x, NpuTensor):
        return x.host
    if isinstance(x, torch.Tensor):
        raise RuntimeError("simulated hccl: No backend type associated with device type cpu")
    return x


class _Hccl(dist.ProcessGroup):
    @property
    def _device_types(self):
        return [torch.device("npu")]  # objects are gathered through tensors of this device

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self):  # noqa: N802
        return "hccl"

    def allreduce(self, tensors, opts=None):
        hosts = [_host(x) for x in tensors]
        if hosts[0].dtype != torch.bfloat16:
            return self.gloo.allreduce(hosts, opts or dist.AllreduceOptions())
        wide = [x.float() for x in hosts]  # gloo has no bfloat16
        self.gloo.allreduce(wide, opts or dist.AllreduceOptions()).wait()
        for x, y in zip(hosts, wide, strict=True):
            x.copy_(y)
        return self.gloo.barrier(dist.BarrierOptions())

    def allgather(self, outputs, inputs, opts=None):
        return self.gloo.allgather(*pytree.tree_map(_host, (outputs, inputs)), opts or dist.AllgatherOptions())

    def broadcast(self, tensors, opts=None):
        return self.gloo.broadcast([_host(x) for x in tensors], opts or dist.BroadcastOptions())

    def barrier(self, opts=None):
        return self.gloo.barrier(dist.BarrierOptions())


def _make(store, rank, size, timeout):
    return _Hccl(store, rank, size, timeout)


if dist.is_available():
    dist.Backend.register_backend("hccl", _make, devices=["npu"])
