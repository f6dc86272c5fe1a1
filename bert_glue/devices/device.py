"""Which device runs, what it can do, how to wait for it, and how much memory it and the host took."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from bert_glue.devices import cpu
from bert_glue.devices.npu import import_torch_npu
from bert_glue.errors import MachineError, UsageError, did_you_mean, first_line

KINDS = ("npu", "cuda", "cpu")
_BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
_FIXES = {
    "npu": "install torch_npu of torch's own version (2.13.0 with 2.13.0) and source CANN's set_env.sh",
    "cuda": "install a CUDA build of torch and check `nvidia-smi`",
    "cpu": "",
}
_NO_NPU = "torch_npu is installed: check `npu-smi info`, ASCEND_RT_VISIBLE_DEVICES and a container's --device flags"


def _module(kind: str):
    """`torch.npu` or `torch.cuda`; None for the CPU or where the device's package is absent."""
    if kind == "npu" and import_torch_npu() is None:
        return None
    return getattr(torch, kind, None) if kind != "cpu" else None


def is_available(kind: str) -> bool:
    """True if at least one device of `kind` can be used now."""
    module = _module(kind)
    return kind == "cpu" or bool(module is not None and module.is_available())


def devices(kind: str) -> list[Device]:
    """All devices of a kind that can be used now, in the order of their index.

    Raises:
        MachineError: its package is there and cannot be imported.
    """
    if not is_available(kind):
        return []
    count = 1 if kind == "cpu" else _module(kind).device_count()
    return [Device(kind, index) for index in range(count)]


@dataclass(frozen=True)
class Device:
    """One resolved device of this process.

    Args:
        kind: npu, cuda or cpu.
        index: device number on this host, 0 for a CPU.
    """

    kind: str
    index: int = 0

    @property
    def torch_device(self) -> torch.device:
        """The device as a torch.device."""
        return torch.device(self.kind) if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def is_host(self) -> bool:
        """True if tensors are in host memory and every operation is complete when its call returns."""
        return self.kind == "cpu"

    @property
    def collective_backend(self) -> str:
        """torch.distributed's backend for this kind of device."""
        return _BACKENDS[self.kind]

    @property
    def name(self) -> str:
        """The name in result files: `model_name`, and for a CPU the number of torch's threads."""
        if not self.is_host:
            return self.model_name
        threads = torch.get_num_threads()
        return f"{self.model_name}, {threads} {'thread' if threads == 1 else 'threads'}"

    @property
    def model_name(self) -> str:
        """Model name of the device; simulated devices are named so."""
        if self.is_host:
            return f"CPU, {os.cpu_count()} cores"
        name = _module(self.kind).get_device_name(self.index)
        return f"simulated {name}" if self.is_simulated else name

    @property
    def product_library(self) -> str | None:
        """The library of large fp32 products on a CPU, MKL or oneDNN; None on devices, which have their own."""
        return cpu.product_library() if self.is_host else None

    @property
    def fp32_products(self) -> str | None:
        """How fp32 numbers are multiplied (`--tf32`): TF32 or fp32 on a GPU, bf16 on a CPU; None where it is fp32."""
        if self.kind == "cuda":
            return "TF32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
        return "bf16" if self.is_host and torch.get_float32_matmul_precision() == "medium" else None

    @property
    def is_simulated(self) -> bool:
        """True on the simulated NPU of the tests, which checks calls and control flow, but no kernels and no speed."""
        return self.kind == "npu" and bool(getattr(import_torch_npu(), "is_simulated", False))

    def return_freed_pages(self) -> None:
        """Keep the memory of a long training on the host flat; devices manage their memory themselves."""
        if self.is_host:
            cpu.return_freed_pages()

    def activate(self, tf32: bool | None = None) -> None:
        """Make this the current device of the process, with the settings that train best on it.

        Args:
            tf32: fp32 products with fewer digits on or off: TensorFloat-32 on CUDA, bf16 on a CPU. None leaves the
                device's default.

        Raises:
            MachineError: `tf32` on a CPU without bf16 products.
        """
        if tf32 is not None and not self.is_host:
            torch.backends.cuda.matmul.allow_tf32 = tf32
        if self.kind != "npu":
            # Libraries that search for torch_npu import it unguarded; a broken one must not end this run.
            sys.modules.setdefault("torch_npu", None)
        if self.is_host:
            if tf32:
                cpu.use_bf16_products()
            cpu.limit_kernels()
            cpu.keep_freed_pages()
            return
        _module(self.kind).set_device(self.index)
        if self.kind == "npu" and not self.is_simulated:
            # Kernels compiled ahead of time; a just-in-time kernel is compiled again for every new shape.
            torch.npu.set_compile_mode(jit_compile=False)

    @property
    def can_compile(self) -> bool:
        """True if `--torch_compile` is available here; the graph compiler of an NPU has never been tried."""
        return self.kind != "npu"

    @property
    def can_record(self) -> bool:
        """True if work on the device can be recorded and replayed."""
        return self.kind == "cuda"

    @property
    def is_shared_by_itself(self) -> bool:
        """True if a sweep puts several runs on one device unasked. On a CPU one run fills the cores; on an NPU nobody
        has tried it."""
        return self.kind == "cuda"

    @property
    def prefers_low_precision_model(self) -> bool:
        """True if `--bf16` alone means O2, where no step casts the weights again, as autocast does (O1)."""
        return self.kind == "cuda"

    @property
    def copies_pinned_memory(self) -> bool:
        """True if a copy from pinned memory lets the host go on, and one from pageable memory stages it first."""
        return self.kind == "cuda"

    def barrier_options(self, backend: str) -> dict[str, list[int]]:
        """Arguments of torch.distributed.barrier: nccl guesses the device of a rank and warns if it is not given."""
        return {"device_ids": [self.index]} if backend == _BACKENDS["cuda"] else {}

    def synchronize(self) -> None:
        """Wait until the device has finished all work; a clock read before that is wrong."""
        if not self.is_host:
            _module(self.kind).synchronize()

    def mark(self) -> Any:
        """Mark the current point in the work of the device, for `seconds_between`; waits for nothing.

        The mark is an event, or the time of the host on a CPU and on devices without events.
        """
        kind = None if self.is_host else getattr(_module(self.kind), "Event", None)
        if kind is None:
            return time.perf_counter()
        event = kind(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to a later one; call `synchronize` first, so that the device has passed both."""
        return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000.0

    def read_later(self, number: torch.Tensor) -> Callable[[], float]:
        """A function that returns the current number of a `[1]` tensor; it waits only for the work queued so far."""
        if self.is_host:
            value = number.item()
            return lambda: value
        copy = torch.empty(1, dtype=number.dtype, pin_memory=not self.is_simulated)
        copy.copy_(number, non_blocking=True)
        wait = getattr(self.mark(), "synchronize", self.synchronize)

        def read() -> float:
            wait()
            return copy.item()

        return read

    def peak_memory(self) -> int:
        """Highest memory in use so far, in bytes: of the allocator on a device, of the process on a CPU."""
        if self.is_host:
            return cpu.peak_memory()
        return int(_module(self.kind).max_memory_allocated())

    def profiler(self) -> Any:
        """A profiler of the host and all devices: start(), stop(), export_chrome_trace(path)."""
        if self.kind == "npu":
            torch_npu = import_torch_npu()
            return torch_npu.profiler.profile()
        return torch.profiler.profile()

    def memory(self) -> tuple[int, int] | None:
        """Free and total memory of the device, in bytes; None for a CPU, which has no memory of its own."""
        if self.is_host:
            return None
        free, total = _module(self.kind).mem_get_info(self.index)
        return int(free), int(total)

    @contextmanager
    def plain_memory_errors(self, fix: str) -> Iterator[None]:
        """A context in which an allocation that the device refuses is a MachineError, one line with `fix`."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MachineError(f"{self.name} has no memory left: {first_line(error)[:160].rstrip('.')}", fix) from error

    def random_state(self) -> torch.Tensor | None:
        """State of the device's own generator, `[bytes]` uint8 on the host; None on a CPU."""
        return None if self.is_host else _module(self.kind).get_rng_state().cpu()

    def set_random_state(self, state: torch.Tensor) -> None:
        """Restore the state that `random_state` returned."""
        if not self.is_host:
            _module(self.kind).set_rng_state(state)

    def renew_generator(self) -> None:
        """Make the generator usable after a recording that failed, with the numbers that it would have drawn next.

        torch leaves it waiting for the end of the recording, and dropout then fails ("Offset increment outside graph
        capture encountered unexpectedly"); a clone of its state does not wait. Never tried on a GPU.
        """
        if not self.is_host:
            generator = _module(self.kind).default_generators[self.index]
            generator.graphsafe_set_state(generator.clone_state())

    def supports(self, dtype: torch.dtype) -> bool:
        """True if the device computes natively in `dtype`, so that training in it makes sense."""
        if dtype == torch.float32:
            return True
        if self.is_host:
            # oneDNN computes bf16 everywhere, in fp32 registers if the CPU has nothing better.
            return dtype == torch.bfloat16 or cpu.has_fp16_products()
        if dtype == torch.bfloat16:
            # torch.cuda counts chips before Ampere too, which convert each bf16 number to fp32 and back.
            natively = {"including_emulation": False} if self.kind == "cuda" else {}
            return bool(_module(self.kind).is_bf16_supported(**natively))
        return True


def _here() -> str:
    """The kinds that can be used now; a kind with a broken package does not count."""
    usable = []
    for kind in KINDS:
        with suppress(MachineError):
            if is_available(kind):
                usable.append(kind)
    return ", ".join(usable)


def _fix(kind: str) -> str:
    return _NO_NPU if kind == "npu" and import_torch_npu() is not None else _FIXES[kind]


def resolve_device(requested: str, local_rank: int = 0, use_cpu: bool = False) -> Device:
    """The device that `--device` means on this machine.

    Args:
        requested: auto, a kind, kind:index, or an index of the best kind here.
        local_rank: rank on this host; it is the index where `requested` has none.

    Raises:
        UsageError: the kind does not exist.
        MachineError: this machine lacks the kind or the index; the message names the fix.
    """
    if use_cpu:
        return Device("cpu")
    kind, colon, index = requested.partition(":")
    if kind.isdecimal():
        kind, index = "auto", kind
    elif colon and not index.isdecimal():
        raise UsageError(f"--device {requested}: {index!r} is not a device number, such as npu:1")
    if kind != "auto" and kind not in KINDS:
        raise UsageError(f"--device: {did_you_mean('device', kind, ['auto', *KINDS])}")
    if kind == "auto":
        kind = next(k for k in KINDS if is_available(k))
    elif not is_available(kind):
        raise MachineError(f"--device {requested}: there is no {kind} device here (there is: {_here()})", _fix(kind))
    if kind == "cpu":
        return Device("cpu")
    count = _module(kind).device_count()
    number = int(index) if index else _index_of_rank(kind, local_rank, count)
    if number >= count:
        raise MachineError(
            f"--device {requested}: {kind} device {number} is not here, there are {count}", f"choose one below {count}"
        )
    return Device(kind, number)


def _index_of_rank(kind: str, local_rank: int, count: int) -> int:
    """Index of a rank's own device: 0 where its launcher lets each rank find one device, else its number on this host.

    With two ranks on one device that both can find, the collective's library refuses to start.
    """
    return 0 if count == 1 and os.environ.get(_VISIBLE[kind]) else local_rank


def has_slow_scatter(kind: str) -> bool:
    """True if sums of rows by index are slow on a device, so that gradients of embeddings are better products.

    On CUDA torch's kernel for up to 4,096 tokens has 24 blocks for a width of 768, and a race in which it rarely reads
    the next tokens too early (pytorch pull request 187687, found by reading; nothing was measured on a GPU).
    """
    return kind == "cuda"


def has_slow_products(kind: str, dtype: torch.dtype) -> bool:
    """True if torch multiplies matrices of a 16-bit `dtype` in loops of its own, 10 to 40 times slower than fp32.

    This happens on CPUs for which oneDNN has no kernels of that dtype (below AVX-512 on x86).
    """
    if kind != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return not (torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)())


def product_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrices of `dtype` are multiplied here: fp32 where `has_slow_products`."""
    return torch.float32 if has_slow_products(kind, dtype) else dtype


def has_onednn_linear(kind: str, is_transposed: bool = False) -> bool:
    """True if oneDNN multiplies here by a matrix, or by its transpose: on CPUs, if torch is built with oneDNN.

    With a transpose its AVX2 kernels take up to twice as long as MKL's; its AVX-512 kernels are equally fast with both.
    """
    if kind != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if cpu.product_library() != "oneDNN":
        return False
    return not is_transposed or torch.backends.cpu.get_cpu_capability() == "AVX512"
