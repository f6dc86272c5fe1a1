"""Throughput: the samples, tokens and floating-point operations of training, and their time.

The device is synchronised before every reading of the clock. Evaluation and saving stop the clock. The first
`skip_steps` optimizer steps are left out. If no step remains, the rates are None, with a reason.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bert_glue import result_keys as keys
from bert_glue.data.batching import Batch
from bert_glue.devices.device import Device, product_dtype
from bert_glue.model.layers import multiply
from bert_glue.model.shape import EncoderShape

_IMPORTED = time.clock_gettime(time.CLOCK_BOOTTIME)


def seconds_since_process_start() -> float:
    """Seconds since the kernel started this process, interpreter and imports included, to 10 ms.

    In a sandbox without /proc the time starts with the import of this module.
    """
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - _IMPORTED
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Phases:
    """The seconds that a process spends in each named phase. In nested phases the time counts for the inner one.

    `seconds["compile"]` is None without `--torch_compile`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float | None] = {"import": seconds_since_process_start(), "compile": None}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A context whose time counts for the phase `name`."""
        self._charge()
        self._open.append(name)
        self.seconds[name] = self.seconds.get(name) or 0.0
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def forward_flops(shape: EncoderShape, lengths: tuple[int, ...], first_only_last: bool = True) -> float:
    """Multiply-adds (as 2 operations) of one forward pass over real tokens.

    Args:
        lengths: tokens of each sequence.
        first_only_last: True for the packed path, whose last layer runs its query, output and
            feed-forward for first tokens only; False counts a full last layer.
    """
    hidden, inner, tokens, count = shape.hidden, shape.intermediate, sum(lengths), len(lengths)
    per_token = 2 * (4 * hidden * hidden + (3 if shape.gated else 2) * hidden * inner)
    # Two products of queries and keys or values, and one for each term of relative positions.
    per_pair = (4 + 2 * len(shape.disentangled.terms if shape.disentangled else ())) * hidden
    seen = [[n if w is None else min(n, 2 * w + 1) for n in lengths] for w in shape.windows or (None,) * shape.layers]
    pairs = [sum(n * keys for n, keys in zip(lengths, own, strict=True)) for own in seen]
    total = sum(per_token * tokens + per_pair * own for own in pairs)
    if first_only_last and shape.pooling == "first":
        total -= per_token * tokens + per_pair * pairs[-1]
        total += 4 * hidden * hidden * tokens + (per_token - 4 * hidden * hidden) * count + per_pair * tokens
    return float(total + 2 * hidden * hidden * count)


# Sides of the largest product. 2048 takes 0.1 s on a CPU core; an H100 needs 8192 to come near its rate, and a product
# of 2048 is over before the host has launched the next one.
_HOST_SIDE, _DEVICE_SIDE = 2048, 8192


def gemm_rate(device: Device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The current matrix-product rate of this device, operations per second: the better of torch's product and ours.

    The size grows in steps up to 2048^3 on a CPU and 8192^3 on a device, because one such product takes minutes where a
    dtype is emulated. Events of the device measure the time, so that the launches of the host are not in it.
    """
    size, best = 256, 0.0
    largest = _HOST_SIDE if device.is_host else _DEVICE_SIDE
    part = _square(device, dtype, size)
    torch.matmul(part, part)  # the library's first call prepares it and may take longer than all others
    device.synchronize()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or best == 0.0:
        for product in (torch.matmul, multiply):
            begin = device.mark()
            product(part, part)
            end = device.mark()
            device.synchronize()
            spent = device.seconds_between(begin, end)
            best = max(best, 2 * size**3 / spent)
        if 8 * spent < seconds and size < largest:
            size *= 2
            part = _square(device, dtype, size)
    return best


def _square(device: Device, dtype: torch.dtype, size: int) -> torch.Tensor:
    return torch.randn(size, size, device=device.torch_device, dtype=dtype)


@dataclass
class Meter:
    """Counts of the training steps that were timed.

    Args:
        device: the device, synchronised before each reading of the clock.
        skip_steps: optimizer steps left out at the start.
        shape: sizes for the operation count; None leaves it out, for encoders whose operations are not known here.
        passes: operations of a training step, as a multiple of the encoder's forward pass.
        first_only_last: as in `forward_flops`.
        runtime: seconds of the whole training, with evaluation and saving.
    """

    device: Device
    skip_steps: int
    shape: EncoderShape | None = None
    passes: int = 3
    first_only_last: bool = True
    steps: int = 0
    samples: int = 0
    windows: int = 0
    real_tokens: int = 0
    computed_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    to_first_step: float | None = None
    timed_steps: int = 0
    runtime: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    _began: float | None = None
    _is_held: bool = False
    _marks: list[Any] = field(default_factory=list)

    @contextmanager
    def whole_training(self) -> Iterator[None]:
        """A context whose time is `runtime`."""
        began = time.perf_counter()
        yield
        self.runtime = time.perf_counter() - began

    def start(self) -> None:
        """Start the clock, if the skipped steps are over."""
        if self.steps >= self.skip_steps and self._began is None and not self._is_held:
            self.device.synchronize()
            self._began = time.perf_counter()
            self._marks = [self.device.mark()]

    def stop(self) -> None:
        """Stop the clock before an evaluation, before saving, and at the end."""
        if self._began is not None:
            self.device.synchronize()
            self.seconds += time.perf_counter() - self._began
            self._began = None
            self.step_seconds += [self.device.seconds_between(a, b) for a, b in itertools.pairwise(self._marks)]

    def hold(self) -> None:
        """Leave out everything until `release`, such as steps that are traced."""
        self.stop()
        self._is_held = True

    def release(self) -> None:
        """Let `start` start the clock again."""
        self._is_held = False

    def count(self, batch: Batch, times: int = 1) -> None:
        """Count one batch of this rank, which runs forward and backward `times` times."""
        if self._began is None:
            return
        self.samples += batch.samples
        self.windows += len(batch.lengths)
        self.real_tokens += batch.real_tokens
        self.computed_tokens += batch.computed_tokens
        if self.shape is not None:
            self.flops += times * self.passes * forward_flops(self.shape, batch.lengths, self.first_only_last)

    def end_step(self) -> None:
        """Count one optimizer step, at its end."""
        self.steps += 1
        self.timed_steps += self._began is not None
        if self.to_first_step is None:
            self.device.synchronize()
            self.to_first_step = seconds_since_process_start()
        if self._began is not None:
            self._marks.append(self.device.mark())
        self.start()

    def rates(self, totals: dict[str, float], dtype: torch.dtype) -> dict[str, float | str | None]:
        """The rates of all ranks together.

        Args:
            totals: sums over ranks of samples, windows, real_tokens, computed_tokens, flops.
            dtype: of the products, for the device's own rate.

        Returns:
            `train_*` entries: samples (rows), windows where they are more, and tokens per second, padding in
            percent, milliseconds of an optimizer step (median, tenth and ninetieth percentile), TFLOP/s of the model
            over real tokens (padding is work, but none of the model's) and its share of a product measured on this
            device (per rank).
        """
        if self.seconds <= 0.0 or not totals["samples"]:
            reason = f"no step was left to time: {self.steps} optimizer steps, --skip_steps {self.skip_steps}"
            key = keys.TRAIN_SAMPLES_PER_SECOND
            return {key: None, keys.reason_key(key): reason}
        padding = 1.0 - totals["real_tokens"] / totals["computed_tokens"]
        rates: dict[str, float | str | None] = {
            keys.TRAIN_SAMPLES_PER_SECOND: totals["samples"] / self.seconds,
            **self._windows_rate(totals),
            keys.TRAIN_REAL_TOKENS_PER_SECOND: totals["real_tokens"] / self.seconds,
            keys.TRAIN_COMPUTED_TOKENS_PER_SECOND: totals["computed_tokens"] / self.seconds,
            keys.TRAIN_PADDING_PERCENT: 100.0 * padding,
            keys.TRAIN_TIMED_STEPS: self.timed_steps,
            keys.TRAIN_TIMED_SECONDS: self.seconds,
        }
        for name, share in (("median", 50), ("p10", 10), ("p90", 90)):
            rates[keys.step_milliseconds_key(name)] = 1000.0 * float(np.percentile(self.step_seconds, share))
        if self.shape is None:
            reason = "this encoder's operations are not counted, only those of the families that can be packed"
            return rates | {keys.TRAIN_SHARE_OF_GEMM: None, keys.reason_key(keys.TRAIN_SHARE_OF_GEMM): reason}
        # Where 16-bit products are computed in fp32 and rounded, torch's own emulation would flatter the share.
        reference = gemm_rate(self.device, product_dtype(self.device.kind, dtype))
        rates[keys.TRAIN_MODEL_TFLOPS_PER_SECOND] = totals["flops"] / self.seconds / 1e12
        rates["device_gemm_tflops_per_second"] = reference / 1e12
        rates[keys.TRAIN_SHARE_OF_GEMM] = self.flops / self.seconds / reference
        return rates

    def _windows_rate(self, totals: dict[str, float]) -> dict[str, float]:
        """Windows per second where some row has several (`--doc_stride`); else they are the samples."""
        if totals["windows"] == totals["samples"]:
            return {}
        return {keys.TRAIN_WINDOWS_PER_SECOND: totals["windows"] / self.seconds}
