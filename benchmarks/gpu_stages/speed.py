"""Stages of gpu.py that time this device, each alone on it: ours, the stock Trainer, products, and kernels of a step.

Steps are recorded, and layers compiled, at the first batches of each shape, so the first 60 of 120 steps are in no
rate. One model is alive at a time.
"""

from __future__ import annotations

import platform
import re
from importlib import metadata
from itertools import product

import torch

from benchmarks.common import StageRows
from benchmarks.estimates import MEAN_TOKENS
from benchmarks.gpu_stages.random_runs import Setting, train, train_ours, train_stock
from benchmarks.gpu_stages.runs import StepWindow
from bert_glue.devices.device import Device, resolve_device
from bert_glue.training.throughput import gemm_rate

OURS, STOCK = "ours", "stock Trainer"
PADDINGS = {"its default": "max_length", "its best": "grouped"}
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "flash_attn", "datasets", "evaluate")


def measure_machine(rows: StageRows) -> None:
    """Device, versions and free memory, the first row of every results file; then its products and copies."""
    device = resolve_device("auto")
    with rows.row("device") as found:
        found |= {"device": device.model_name, "memory_bytes": device.memory(), "is_host": device.is_host}
        found |= {"python": platform.python_version(), "platform": platform.platform(), "cuda": torch.version.cuda}
        found["packages"] = {name: _version(name) for name in _PACKAGES}
        if not device.is_host:
            properties = torch.cuda.get_device_properties(device.index)
            found |= {"capability": [properties.major, properties.minor], "tf32": torch.backends.cuda.matmul.allow_tf32}
    _time_products(rows, device)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _time_products(rows: StageRows, device: Device) -> None:
    """Products of 8192^3 by events of the device, and the rate of a copy."""
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, None), ("fp16", torch.float16, None), ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):  # fmt: skip
        if device.is_host and name != "fp32" or not device.supports(dtype):
            continue
        with rows.row("product", precision=name) as found:
            device.activate(tf32)
            found["tflops_per_second"] = gemm_rate(device, dtype, 0.05 if rows.is_tiny else 1.0) / 1e12
    with rows.row("copy") as found:
        source = torch.empty(1 << (22 if rows.is_tiny else 31), dtype=torch.uint8, device=device.torch_device)
        target, seconds = torch.empty_like(source), []
        for _ in range(6):
            begin = device.mark()
            target.copy_(source)
            end = device.mark()
            device.synchronize()
            seconds.append(device.seconds_between(begin, end))
        found["bytes_per_second"] = 2 * len(source) / min(seconds)


def _steps(rows: StageRows, is_stock: bool, is_large: bool = False) -> dict[str, int]:
    """`steps` and `skip` of a run; the stock Trainer records nothing and needs fewer, as its steps are long."""
    if rows.is_tiny:
        return {"steps": 3, "skip": 1}
    if not is_stock:
        return {"steps": 120, "skip": 60}
    return {"steps": 20, "skip": 6} if is_large else {"steps": 40, "skip": 10}


def _measure(rows: StageRows, setting: Setting, seconds: float, **known: object) -> None:
    """A row of ours; `seconds` is what it may take."""
    known = {**setting.about, **known}
    if setting.is_recorded and not resolve_device("auto").can_record:
        rows.skip(OURS, "this device cannot record steps", **known)
    elif rows.has_time(seconds, OURS, **known):
        with rows.row(OURS, **known) as found:
            found |= train_ours(setting)


def _measure_stock(rows: StageRows, setting: Setting, seconds: float, **known: object) -> None:
    """Two rows of the stock Trainer: its default and its best."""
    for how, padding in PADDINGS.items():
        about = {**setting.about, "how": how, "level": None, **known}
        if rows.has_time(seconds, STOCK, **about):
            with rows.row(STOCK, **about) as found:
                found |= train_stock(setting, padding)


def _time_shape(rows: StageRows, shape: str) -> None:
    """A shape at batch 32 and 256: recorded, eager, the stock Trainer, then compiled, alone and recorded."""
    is_large = shape == "bert-large"
    batches = (4,) if rows.is_tiny else (32, 256)
    shape = "tiny" if rows.is_tiny else shape
    seconds = 12 if is_large else 8

    def ours(batch: int, is_recorded: bool, is_compiled: bool) -> None:
        steps = _steps(rows, is_stock=False)
        setting = Setting(shape=shape, batch=batch, is_recorded=is_recorded, is_compiled=is_compiled, **steps)
        _measure(rows, setting, 3 * seconds if is_compiled else seconds)

    for batch in batches:
        ours(batch, True, False)
        ours(batch, False, False)
        _measure_stock(rows, Setting(shape=shape, batch=batch, **_steps(rows, True, is_large)), seconds)
    if not rows.is_tiny:  # the stage "compiled" has compiled the same layers
        for batch, is_recorded in product(batches, (True, False)):
            ours(batch, is_recorded, True)


def time_base(rows: StageRows) -> None:
    """bert-base."""
    _time_shape(rows, "bert-base")


def time_large(rows: StageRows) -> None:
    """bert-large."""
    _time_shape(rows, "bert-large")


def row_lengths(task: str) -> tuple[int, int]:
    """Least and most tokens of random rows whose mean is the task's, as wide about it as those of mrpc."""
    mean = MEAN_TOKENS[task]
    return max(3, round(0.45 * mean)), min(128, round(1.55 * mean))


def time_tasks(rows: StageRows) -> None:
    """bert-base at batch 32 with rows as long as each GLUE task's, against the stock Trainer."""
    shape, batch = ("tiny", 4) if rows.is_tiny else ("bert-base", 32)
    for task in list(MEAN_TOKENS)[: 1 if rows.is_tiny else None]:
        setting = Setting(shape=shape, batch=batch, lengths=row_lengths(task), is_recorded=True, **_steps(rows, False))
        _measure(rows, setting, 6, task=task)
        stock = Setting(shape=shape, batch=batch, lengths=row_lengths(task), **_steps(rows, True))
        _measure_stock(rows, stock, 6, task=task)


def time_padded(rows: StageRows) -> None:
    """fp32 packed against padded, and bert-large on rows of 128 tokens."""
    base, large = ("tiny", "tiny") if rows.is_tiny else ("bert-base", "bert-large")
    batch, steps = 4 if rows.is_tiny else 32, _steps(rows, is_stock=False)
    few = _steps(rows, is_stock=True)
    single = {"batch": batch, "precision": "fp32", "level": "O0"}
    _measure(rows, Setting(shape=large, batch=batch, lengths=(128, 128), is_recorded=True, **steps), 12)
    _measure(rows, Setting(shape=base, is_recorded=True, **single, **steps), 8)
    _measure(rows, Setting(shape=base, **single, **few), 8)
    _measure(rows, Setting(shape=base, is_padded=True, **single, **few), 8)
    _measure(rows, Setting(shape=large, batch=batch, lengths=(128, 128), is_padded=True, **few), 12)
    _measure_stock(rows, Setting(shape=base, **single, **few), 8)


# Part of a step -> what the names of its kernels contain; the first match counts.
_KERNELS = {
    "attention": r"flash|fmha|attention|softmax",
    "products": r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitk|addmm|::mm|bmm|linear",
    "update": r"adam|multi_tensor|lamb",
    "embeddings": r"embedding|index|gather|scatter|sort|radix",
    "copies": r"memcpy|memset|copy|cat",
}


def kernel_shares(times: dict[str, float]) -> dict[str, float]:
    """Share of each part of a step in the time of all its kernels; "pointwise" is what no other part names."""
    total, shares = sum(times.values()), dict.fromkeys((*_KERNELS, "pointwise"), 0.0)
    for name, seconds in times.items():
        part = next((part for part, words in _KERNELS.items() if re.search(words, name.lower())), "pointwise")
        shares[part] += seconds / total
    return shares


def profile_steps(rows: StageRows) -> None:
    """Kernels of three steps: their number, their shares of the device's time, and the longest."""
    device = resolve_device("auto")
    cases = [("bert-base", 32), ("bert-base", 256), ("bert-large", 32), ("bert-large", 256)]
    for shape, batch in [("tiny", 4)] if rows.is_tiny else cases:
        setting = Setting(shape=shape, batch=batch, steps=12, skip=2)
        if rows.has_time(12, "kernels", **setting.about):
            with rows.row("kernels", **setting.about) as found:
                found |= _profiled(setting, device)


def _profiled(setting: Setting, device: Device) -> dict[str, object]:
    profiler = torch.profiler.profile()
    train(setting, StepWindow(9, 11, profiler))
    events = profiler.key_averages()
    if device.is_host:
        times = {event.key: (event.self_cpu_time_total, event.count) for event in events}
    else:
        # The optimizer's own annotation spans its kernels, which would count twice.
        own = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [event for event in own if not getattr(event, "is_user_annotation", False)]
        times = {event.key: (event.self_device_time_total, event.count) for event in kernels}
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:24]
    return {
        "kernels_a_step": sum(count for _, count in times.values()) / 3,
        "busy_milliseconds_a_step": sum(micro for micro, _ in times.values()) / 3000,
        "shares": kernel_shares({name: micro for name, (micro, _) in times.items()}),
        "longest": [[name[:110], round(micro / 3000, 4), round(count / 3, 1)] for name, (micro, count) in longest],
    }
