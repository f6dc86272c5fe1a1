"""The host's CPU: what it is, how many threads a model takes on it, and how its memory is kept."""

from __future__ import annotations

import ctypes
import os
import resource
from functools import cache
from pathlib import Path

import torch
from torch import nn

from bert_glue.errors import MachineError

# Multiply-adds of the largest product of a batch of full-length rows, below which one thread computes all: real rows
# are shorter, so that this product takes a millisecond at most. Threads spin while they wait for each other, after
# every operation; where another program holds one of their cores, each wait lasts as long as its time slice. The
# README's first command on two busy cores: 137 s of CPU and 312 s of training with two threads, 12 s with one.
_LEAST_FOR_THREADS = 1 << 27
_MOST_KERNELS = 256


@cache
def _facts() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, by the kernel's names; empty in a sandbox without /proc."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def features() -> frozenset[str]:
    """Instruction-set names as the kernel spells them."""
    facts = _facts()
    return frozenset((facts.get("flags") or facts.get("Features") or "").split())


def has_fp16_products() -> bool:
    """True if the CPU multiplies matrices in fp16 natively."""
    return bool(features() & {"avx512_fp16", "amx_fp16", "fphp", "asimdhp"})


@cache
def _threads_at_start() -> int:
    return torch.get_num_threads()


def has_bf16_products() -> bool:
    """True if the CPU multiplies matrices in bf16 natively, which is faster than fp32."""
    return bool(features() & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def use_bf16_products() -> None:
    """Multiply fp32 matrices in bf16 and add in fp32, as TensorFloat-32 does with three more digits on a GPU.

    Raises:
        MachineError: this processor has no bf16 products.
    """
    if not has_bf16_products():
        raise MachineError("--tf32: this processor has no products with fewer digits than fp32; leave the flag out")
    torch.set_float32_matmul_precision("medium")  # read by oneDNN, for its own products and for torch.matmul


def vendor() -> str:
    """The vendor as the kernel names it, such as AuthenticAMD. "" if it does not, as on Arm."""
    return _facts().get("vendor_id", "")


@cache
def product_library() -> str:
    """The library that multiplies large fp32 matrices, MKL or oneDNN; the processor decides, so it is always the same.

    | processor | MKL | oneDNN |
    |---|---|---|
    | AMD EPYC, AVX-512, GFLOP/s a core | 110 | 170 to 240 |
    | Intel, AVX-512 and AMX, MiniLM on mrpc, real tokens/s, two runs | 3,498 and 3,508 | 2,655 and 2,791 |

    Products in bf16 are always oneDNN's: MKL has none that torch calls.
    """
    return "MKL" if vendor() == "GenuineIntel" and torch.backends.mkl.is_available() else "oneDNN"


def largest_product(module: nn.Module, tokens: int) -> int:
    """Multiply-adds of the largest matrix product that a module computes for `tokens`."""
    return tokens * max((part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear)), default=0)


def use_threads(work: int, wanted: int | None) -> str:
    """Set how many threads torch computes with.

    Args:
        work: `largest_product` of a batch of full-length rows.
        wanted: `--num_cpu_threads_per_process`; None: OMP_NUM_THREADS, or else by size.

    Returns:
        How many, and why, for the log.
    """
    count, reason = _threads_at_start(), "all cores"
    if wanted is not None:
        count, reason = wanted, "--num_cpu_threads_per_process"
    elif os.environ.get("OMP_NUM_THREADS"):
        reason = "OMP_NUM_THREADS"
    elif work < _LEAST_FOR_THREADS:
        count, reason = 1, "a small model; --num_cpu_threads_per_process takes more"
    # By size and not by a stopwatch: this number decides how sums are rounded, so a resumed run must have the same.
    torch.set_num_threads(count)
    return f"{count} ({reason})"


def peak_memory() -> int:
    """Highest memory of this process so far, bytes."""
    try:
        # Not getrusage: that also counts what the parent process held before exec.
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # a sandbox without /proc
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_kernels() -> None:
    """Let oneDNN, and ideep above it, keep 256 kernels each instead of 1,024; a number in the environment stays.

    A kernel of a bf16 product with AMX holds 0.6 MB, and rare shapes arrive for hours: 550 MB after 50 steps became 690
    after 1,000. Rare shapes are made again: a tiny model in bf16 trained 15 % slower on rows like MRPC's. Both
    libraries read the variables at their first product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_MOST_KERNELS))


def keep_freed_pages() -> None:
    """Tell glibc to reuse freed blocks: by default each large tensor is new, zeroed pages every time.

    Costs nothing but memory the process had already used; 10 to 30 % of a CPU training step.
    """
    libc = _glibc()
    if libc is not None:
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def return_freed_pages() -> None:
    """Give the kernel back the pages that no block uses, as a counterweight to `keep_freed_pages`.

    Batches of all lengths leave free blocks between used ones, and none is large enough for the next long batch. The
    heap grows by such blocks for hours. A call takes 0.06 s after steps of 1.2 GB; the next step has the pages zeroed.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
