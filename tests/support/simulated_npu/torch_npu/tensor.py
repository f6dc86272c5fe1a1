"""Tensors that report the device "npu" and live in host memory.

A wrapper subclass per tensor and one `Memory` per allocation: views of one allocation share it, so that
it can be moved under them, as `npu_change_data_ptr` does. Every operator that reaches the device runs on
the host copies; mixing host and device tensors fails as it does on a device. A process uses one device,
its current one: torch's Python backends have a single index, which every tensor has inside torch.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import chain

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from torch_npu import npu
from torch_npu.chip import CHIP, is_moving, saturate


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self):
        return True

    def has_primary_context(self, device_index):
        return True

    def is_built(self):
        return True


_setup_privateuseone_for_python_backend("npu", npu, _Hooks(), _Guard())
CALLS: Counter[str] = Counter()
aten = torch.ops.aten


class Memory:
    """One allocation of the device.

    Args:
        storage: host memory that stands for it.
        first: byte of `storage` where it begins.
    """

    def __init__(self, storage: torch.UntypedStorage, first: int = 0):
        self.storage, self.first, self.nbytes = storage, first, storage.nbytes()
        self.moves = 0
        npu.IN_USE.add(self.nbytes)

    def __del__(self, in_use=npu.IN_USE):  # an argument outlives the module at the interpreter's end
        in_use.add(-self.nbytes)

    def move(self, other: Memory, byte: int) -> None:
        """Let all tensors of this allocation look at another one from `byte` on; contents are not copied."""
        self.storage, self.first, self.moves = other.storage, other.first + byte, self.moves + 1


class NpuTensor(torch.Tensor):
    """A tensor on the simulated device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor, memory: Memory):
        offset = host.storage_offset() - memory.first // host.element_size()
        self = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=offset, dtype=host.dtype, layout=host.layout,
            device=torch.device("npu", 0),
        )  # fmt: skip
        self._memory, self._host, self._moves = memory, host, memory.moves
        return self

    @property
    def host(self) -> torch.Tensor:
        """The numbers as a host tensor that shares their memory."""
        if self._moves != self._memory.moves:
            first = self._memory.first // self.element_size() + self.storage_offset()
            host = torch.empty(0, dtype=self.dtype)
            self._host = host.set_(self._memory.storage, first, self.size(), self.stride())
            self._moves = self._memory.moves
        return self._host

    @property
    def device(self):
        return torch.device("npu", npu.current_device())

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self._memory, self._host, self._moves = other._memory, other.host, other._memory.moves

    def __repr__(self):
        return f"NpuTensor({self.host}, device={self.device})"

    def tolist(self):
        return self.host.tolist()

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        raise NotImplementedError("simulated npu: its storage is not host memory")

    def storage(self):
        return _Storage(self._memory.nbytes // self.element_size())

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class _Storage:
    """The result of `Tensor.storage()`, which only knows its number of elements."""

    def __init__(self, elements: int):
        self.elements = elements

    def size(self) -> int:
        return self.elements


def on_device(host: torch.Tensor, known: dict[int, Memory] | None = None) -> NpuTensor:
    """A host tensor as one of the device; allocations are recognised in `known`, by address."""
    storage = host.untyped_storage()
    return NpuTensor(host, (known or {}).get(storage._cdata) or Memory(storage))


def _is_npu(device) -> bool:
    """True for the current device, or its only index inside torch; other devices are another process's."""
    if device is None or torch.device(device).type != "npu":
        return False
    index = torch.device(device).index or 0
    if index not in (0, npu.current_device()):
        raise RuntimeError(f"simulated npu: this process is on npu:{npu.current_device()}, not on npu:{index}")
    return True


def _to_copy(x, device=None, non_blocking=False, pin_memory=False, **kwargs):
    host = x.host if isinstance(x, NpuTensor) else x
    result = aten._to_copy.default(host, **kwargs)
    if CHIP.saturates and isinstance(x, NpuTensor) and result.dtype != host.dtype:
        saturate(result)
    return on_device(result) if device is None or _is_npu(device) else result


def _copy(to, source, non_blocking=False):
    (to.host if isinstance(to, NpuTensor) else to).copy_(source.host if isinstance(source, NpuTensor) else source)
    return to


_CROSSING = {
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten._copy_from.default: lambda source, to, non_blocking=False: _copy(to, source),
}


def run(function, args, kwargs):
    """One operator, on the host copies of its tensors."""
    CALLS[str(function)] += 1
    if function in _CROSSING:
        return _CROSSING[function](*args, **kwargs)
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, NpuTensor)]
    if tensors and "index" not in str(function):
        for x in flat:
            if type(x) is torch.Tensor and x.dim():
                raise RuntimeError(f"Expected all tensors to be on the same device, found npu and cpu in {function}")
    hosts = [x.host if isinstance(x, NpuTensor) else x for x in flat]
    args, kwargs = pytree.tree_unflatten(hosts, spec)
    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    if torch.Tag.nondeterministic_seeded in function.tags:
        with npu.own_generator():
            result = function(*args, **kwargs)
    else:
        result = function(*args, **kwargs)
    goes_to_device = _is_npu(target) if target is not None else bool(tensors)
    same = {id(host): x for host, x in zip(hosts, flat, strict=True) if isinstance(x, NpuTensor)}
    known = {x._memory.storage._cdata: x._memory for x in reversed(tensors)}
    computes = not is_moving(function._schema.name.rpartition(":")[2])

    def wrap(x):
        if not isinstance(x, torch.Tensor) or not (goes_to_device or id(x) in same):
            return x
        if x.dtype == torch.bfloat16 and not CHIP.has_bf16:
            raise RuntimeError(f"simulated {CHIP.name}: {function} has no bfloat16")
        if CHIP.saturates and computes:
            saturate(x)
        return same[id(x)] if id(x) in same else on_device(x, known)

    return pytree.tree_map(wrap, result)


# Factories have no tensor that would lead to __torch_dispatch__.
_everything = torch.library.Library("_", "IMPL")
_everything.fallback(lambda function, *args, **kwargs: run(function, args, kwargs), "PrivateUse1")
_factories = torch.library.Library("aten", "IMPL", "PrivateUse1")
for _name in (
    "empty.memory_format", "empty_strided", "_copy_from", "_local_scalar_dense", "copy_", "_to_copy", "detach",
    "view", "as_strided", "alias",
):  # fmt: skip
    _packet, _, _overload = _name.partition(".")
    _operator = getattr(getattr(aten, _packet), _overload or "default")
    _factories.impl(_name, lambda *args, _operator=_operator, **kwargs: run(_operator, args, kwargs))


# Autocast: products in the low precision, norms and losses in fp32, everything else as it comes.

_fall_through = torch.library.Library("_", "IMPL")
_fall_through.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_casting = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_LOW = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
_HIGH = ("layer_norm", "cross_entropy_loss", "mse_loss", "softmax.int", "log_softmax.int")


def _casts(operator, dtype):
    def call(*args, **kwargs):
        wanted = dtype or torch.get_autocast_dtype("npu")

        def cast(x):
            is_cast = isinstance(x, NpuTensor) and x.is_floating_point()
            return x.to(wanted) if is_cast else x

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operator(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))

    return call


for _name in chain(_LOW, _HIGH):
    _packet, _, _overload = _name.partition(".")
    _operator = getattr(getattr(aten, _packet), _overload or "default")
    _casting.impl(_name, _casts(_operator, torch.float32 if _name in _HIGH else None))


def write_calls() -> None:
    """How often each operator ran, for tests that ask: into the file named by SIMULATED_NPU_CALLS."""
    import json

    path = os.environ.get("SIMULATED_NPU_CALLS")
    if path:
        with open(f"{path}.{os.environ.get('RANK', '0')}", "w", encoding="utf-8") as file:
            json.dump(CALLS, file)
